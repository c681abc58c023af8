"""Twenty steps on every kind of layout against OpenCLIP and torch's AdamW in one process."""

import functools
import math

import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.ranks import copies, whole_tensors
from tests.small_models import distance, image_batch, small_model, token_batch
from tests.training.step_cases import Task, bad_number, train

STEPS, BATCH, LR = 20, 8, 1e-3
MODELS = {
    "infonce": small_model({"ls_init_value": 0.3}),
    "sigmoid": small_model(
        text={"proj_bias": True, "pool_type": "last"},
        custom_text=True,
        init_logit_scale=math.log(10),
        init_logit_bias=-10,
    ),
}
OPTIMIZER = {"lr": LR, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}

RUNS = {
    # name: layout, microbatches, loss, norm to clip at, ZeRO-1
    "plain": (Layout(1), 1, "infonce", None, True),
    "plain-sigmoid-clipped": (Layout(1), 4, "sigmoid", 0.5, False),
    "data2-zero": (Layout(2), 2, "infonce", None, True),
    "data2-whole-clipped": (Layout(2), 1, "infonce", 0.3, False),
    "data3-zero-clipped": (Layout(3), 1, "infonce", 0.3, True),
    "tensor2": (Layout(2, tensor=2), 1, "infonce", None, True),
    "tensor2-sequence-clipped": (Layout(2, tensor=2, sequence=True), 4, "infonce", 0.3, False),
    "data2-tensor2-sequence-zero": (
        Layout(4, tensor=2, sequence=True), 2, "sigmoid", 0.5, True
    ),
    "data2-tensor2-sequence-whole": (
        Layout(4, tensor=2, sequence=True), 1, "infonce", None, False
    ),
    "pipeline2-clipped": (Layout(2, pipeline=2), 4, "infonce", 0.3, False),
    "pipeline3-sigmoid-clipped": (Layout(3, pipeline=3), 2, "sigmoid", 0.5, False),
    "data2-pipeline2-virtual2-zero-clipped": (
        Layout(4, pipeline=2, virtual_pipeline=2), 2, "infonce", 0.3, True
    ),
    "tensor2-sequence-pipeline2-sigmoid": (
        Layout(4, tensor=2, pipeline=2, sequence=True), 1, "sigmoid", None, False
    ),
}  # fmt: skip


def batch_for(layout: Layout) -> int:
    return 9 if layout.data == 3 else BATCH


def task(loss: str, batch: int, clip: float | None, zero: bool) -> Task:
    model_cfg = MODELS[loss]
    return Task(
        model_cfg,
        reference.random_weights(model_cfg, seed=8),
        image_batch(model_cfg, batch),
        token_batch(model_cfg, batch),
        {
            "loss": {"kind": loss},
            "parallel": {"distributed_optimizer": zero},
            "optimizer": OPTIMIZER | {"clip_grad_norm": clip},
        },
    )


@functools.cache
def expected(loss: str, batch: int, clip: float | None) -> reference.Reference:
    given = task(loss, batch, clip, True)
    return reference.reference_run(
        given.model_cfg,
        given.weights,
        reference.Batch(given.images, given.tokens, []),
        steps=STEPS,
        learning_rate=lambda step: LR,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        clip_grad_norm=clip,
        loss=loss,
    )


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_are_openclips(processes, run):
    layout, microbatches, loss, clip, zero = RUNS[run]
    batch = batch_for(layout)
    answers = processes.run(
        layout,
        train,
        task=task(loss, batch, clip, zero),
        steps=STEPS,
        lr=LR,
        microbatches=microbatches,
    )
    records, weights, _ = expected(loss, batch, clip)
    if clip is not None:
        assert records[0]["grad_norm"] > clip, "nothing would be clipped"
    for answer in answers:
        for step, (ours, theirs) in enumerate(zip(answer[0], records, strict=True)):
            tolerance = 1e-5 if step == 0 else 1e-4
            assert ours.keys() == theirs.keys()
            for what, value in theirs.items():
                if value is None:
                    assert ours[what] is None
                else:
                    assert ours[what] == pytest.approx(value, rel=tolerance, abs=1e-6), (step, what)

    table = parameter_table(architecture_from_json(MODELS[loss], "small"))
    for ranks in copies(layout, answers):
        ours = whole_tensors(table, [held for _, held in ranks])
        assert ours.keys() == weights.keys()
        assert distance(flat(ours), flat({name: weights[name] for name in ours})) < 1e-4
        for name, theirs in weights.items():
            assert distance(*without_key_bias(name, ours[name], theirs)) < 1e-4, name


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def without_key_bias(name: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Softmax is blind to the key's bias: its gradient is rounding, which Adam makes large."""
    if not name.endswith("in_proj_bias"):
        return list(tensors)
    return [torch.cat([query, value]) for query, _, value in (x.chunk(3) for x in tensors)]


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pipeline=2)], ids=str)
def test_a_step_whose_numbers_are_not_finite_is_not_done(processes, layout, loss):
    given = task(loss, BATCH, None, True)
    for message, unchanged in processes.run(layout, bad_number, task=given):
        assert "loss is nan" in message
        assert "not finite: image features of rank" in message and "text" not in message
        assert unchanged
