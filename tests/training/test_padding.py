"""With `parallel.pad` the padding is zero to the last bit, whatever trains and loads."""

import math

import pytest

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.small_models import KINDS, image_batch, small_model, timm_model, token_batch
from tests.training.padding_cases import train_and_load
from tests.training.step_cases import Task

STEPS, BATCH = 4, 8
THREE_HEADS = {"head_width": 16, "ls_init_value": 0.3}, {"width": 48, "heads": 3}
POOL = timm_model(  # whose activation is tanh's approximation of GELU
    "vit_so400m_patch16_siglip_256",
    {"timm_pool": "map", "timm_proj": "linear"},
    {"act_kwargs": {"approximate": "tanh"}},
)

RUNS = {
    # name: layout, model, precision, recompute, norm to clip at, ZeRO-1
    "zero-bf16-clipped": (
        Layout(4, tensor=2, sequence=True),
        small_model(*THREE_HEADS, quick_gelu=True), "bf16", "selective", 0.1, True,
    ),
    "data2-whole": (Layout(4, tensor=2), small_model(*THREE_HEADS), "fp32", "none", None, False),
    "pool-tanh": (
        Layout(3, tensor=3, sequence=True), POOL, "fp32", "full", None, True,
    ),
    "pipeline2-bf16": (
        Layout(4, tensor=2, pipeline=2), KINDS["three-heads"], "bf16", "full", 0.1, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_padding_stays_zero(processes, tmp_path, name):
    layout, model_cfg, precision, recompute, clip, zero = RUNS[name]
    settings = {
        "precision": precision,
        "recompute": recompute,
        "parallel": {"distributed_optimizer": zero, "pad": True},
        "optimizer": {"weight_decay": 0.2, "clip_grad_norm": clip},
    }
    weights = reference.random_weights(model_cfg, seed=1)
    inputs = image_batch(model_cfg, BATCH), token_batch(model_cfg, BATCH)
    task = Task(model_cfg, weights, *inputs, settings)
    answers = processes.run(
        layout, train_and_load, task=task, steps=STEPS, run_dir=tmp_path / "run"
    )
    table = parameter_table(architecture_from_json(model_cfg, "small"))
    padded = {
        p.name: layout.tensor * math.prod(p.local_shape(layout.tensor)) - math.prod(p.shape)
        for p in table
        if p.placement.axis is not None
    }
    assert sum(size > 0 for size in padded.values()) > 8, "heads and MLP of both towers"
    for moment in range(2):
        held = [entry for answer in answers for entry in answer[moment]]
        assert [entry for entry in held if entry.not_zero] == []
        for what in ("weight", "gradient", "master", "exp_avg", "exp_avg_sq"):
            found = dict.fromkeys(padded, 0)
            largest = dict.fromkeys(padded, 0.0)
            for entry in held:
                if entry.what == what and entry.tensor in padded:
                    found[entry.tensor] += entry.padding
                    largest[entry.tensor] = max(largest[entry.tensor], entry.largest)
            # Whole on each data rank, or split over them.
            whole = what in ("weight", "gradient") or not zero
            copies = layout.data if whole else 1
            assert found == {n: copies * size for n, size in padded.items()}, what
            if (moment, what) != (1, "gradient"):
                assert min(largest.values()) > 0, (what, "of what is no padding")
