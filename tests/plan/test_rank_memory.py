import dataclasses
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist

from parallel_clip.config import config_from_dict
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.memory import dry_run, measure_rank_memory
from tests.small_models import KINDS

# Nothing divides by anything: 17 and 13 tokens, 101 words; there are 4 heads to split.
SMALL = architecture_from_json(
    {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 64,
            "layers": 3,
            "head_width": 16,
            "patch_dropout": 0.3,
        },
        "text_cfg": {
            "context_length": 13,
            "vocab_size": 101,
            "width": 32,
            "heads": 4,
            "layers": 2,
        },
    },
    "small",
)
SIGLIP, PE_CORE = (
    architecture_from_json(KINDS[kind], kind) for kind in ("timm-siglip", "timm-pe-core")
)
PAIRS = 5


def config_for(
    layout: Layout,
    precision="bf16",
    recompute="none",
    zero=False,
    freeze=None,
    ema=None,
    captions=1,
):
    return config_from_dict(
        {
            "train": {"steps": 1},
            "data": {
                "train": [{"shards": "none.tar", "caption_lines": True}],
                "captions_per_image": captions,
            },
            "batch": {"global": PAIRS * layout.data, "micro": PAIRS},
            "precision": precision,
            "recompute": recompute,
            "freeze": freeze or {},
            "ema": {"decay": ema},
            "parallel": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "stages": {"vision": [1, 2], "text": [1, 1]} if layout.pipeline == 2 else None,
                "pad": layout.tensor == 3,
                "sequence": layout.sequence,
                "distributed_optimizer": zero,
            },
        }
    )


def plan_for(config, model=SMALL) -> LayoutPlan:
    ranks = config.parallel.tensor * config.parallel.pipeline
    world = config.batch.global_ // PAIRS * ranks
    return make_layout_plan(model.costs, world, config)


def held(layout: Layout, rank: int = 0, **settings):
    config = config_for(layout, **settings)
    return dry_run(config, SMALL, plan_for(config), rank)


def test_bytes_of_each_number():
    found = held(Layout(1))
    towers = found.parameters - 1
    assert found.weights == 2 * towers + 4, "bf16, and logit_scale in fp32"
    assert found.optimizer == 4 * towers + 8 * found.parameters, "masters and two moments"
    assert found.gradients == pytest.approx(4 * found.parameters, abs=1024), "padded buffers"

    found = held(Layout(1), precision="fp32")
    assert found.weights == 4 * found.parameters
    assert found.optimizer == 8 * found.parameters, "the weights are masters themselves"


def test_the_world_may_be_large_and_its_ranks_are_equal():
    layout = Layout(1024, tensor=4, sequence=True)
    first, last = held(layout), held(layout, rank=1023)
    assert first == last == held(Layout(4, tensor=4, sequence=True))


def test_texts_are_kept_for_every_caption():
    (one,), (three,) = (held(Layout(1), captions=count).activations for count in (1, 3))
    assert one.keys() == three.keys()
    for kind, size in one.items():
        if kind:  # else what joins both towers
            assert three[kind] == size * (3 if kind.startswith("text") else 1), kind


def test_averages_take_four_bytes_a_parameter():
    without, found = (held(Layout(1), ema=ema) for ema in (None, 0.9))
    assert without.averages == 0 and found.averages == 4 * found.parameters
    assert found.state == without.state + found.averages
    whole = sum(prod(p.shape) for p in parameter_table(SMALL) if p.placement.axis is None)
    assert found.replicated == without.replicated + 4 * whole
    shared = held(Layout(4), zero=True, ema=0.9)
    assert shared.averages == pytest.approx(found.averages / 4, rel=0.02)


@pytest.mark.parametrize("tensor", [2, 4])
def test_what_is_not_replicated_is_split(tensor):
    whole, part = held(Layout(1)), held(Layout(tensor, tensor=tensor))
    split = (whole.state - whole.replicated) / tensor + whole.replicated
    added_words = -101 % tensor / tensor * 32 * 18
    assert part.replicated == whole.replicated
    assert part.state == pytest.approx(split + added_words, abs=1024), "padded buffers"


def test_padding_is_held_as_all_else_is():
    """Room for 2 of 4 heads, 86 of 256 and 43 of 128 MLP channels, and 34 of 101 words."""
    whole, part = held(Layout(1)), held(Layout(3, tensor=3))
    split = sum(prod(p.shape) for p in parameter_table(SMALL) if p.placement.axis is not None)
    of_head, of_channel = (lambda h, d: 4 * h * d + 3 * d), (lambda h: 2 * h + 1)
    vision = 3 * ((2 - 4 / 3) * of_head(64, 16) + (86 - 256 / 3) * of_channel(64))
    text = 2 * ((2 - 4 / 3) * of_head(32, 8) + (43 - 128 / 3) * of_channel(32))
    padding = vision + text + (34 - 101 / 3) * 32
    assert part.parameters == pytest.approx(whole.parameters - split * 2 / 3 + padding)
    assert part.weights == 2 * part.parameters + 2, "bf16, and logit_scale in fp32"
    assert part.replicated == whole.replicated


def test_the_distributed_optimizer_splits_its_state_over_data_ranks():
    alone, shared = held(Layout(1)), held(Layout(4), zero=True)
    assert shared.optimizer == pytest.approx(alone.optimizer / 4, rel=0.02)
    assert shared.weights == pytest.approx(alone.weights, rel=0.02), "padded buffers"


def test_recompute_and_sequence_parallelism_save_activations():
    layout = Layout(2, tensor=2, sequence=True)
    none, selective, full = (
        held(layout, recompute=recompute).saved for recompute in ("none", "selective", "full")
    )
    assert full < 0.4 * selective < 0.4 * none
    assert none < held(Layout(2, tensor=2)).saved < held(Layout(1)).saved


def test_a_process_that_is_a_rank_already_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="has joined no process group"):
            held(Layout(1))
    finally:
        dist.destroy_process_group()


def test_what_is_frozen_has_neither_gradients_nor_masters_nor_moments():
    whole, text = held(Layout(1)), held(Layout(1), freeze={"vision": "all"})
    assert text.weights == whole.weights and text.parameters == whole.parameters
    of_text = sum(prod(p.shape) for p in parameter_table(SMALL) if "visual." not in p.name)
    assert text.gradients == pytest.approx(4 * of_text, abs=1024), "padded buffers"
    assert text.optimizer == 4 * (of_text - 1) + 8 * of_text
    assert not any("vision" in part for part in text.activations[0])
    nothing = held(Layout(1), freeze={"vision": "all", "text": "all"})
    assert nothing.optimizer == 8, "the moments of logit_scale"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_in_front_of_what_is_trained_keep_nothing(recompute):
    """Of 3 blocks the last one is trained."""
    whole = held(Layout(1), recompute=recompute).activations[0]
    last = {"vision": {"unlocked_groups": 2}}
    kept = held(Layout(1), recompute=recompute, freeze=last).activations[0]
    of_whole, of_kept = (
        sum(size for part, size in found.items() if part.startswith("vision.block"))
        for found in (whole, kept)
    )
    # Where norms are recomputed, the first one that is trained is not: bf16, and statistics.
    norm = 2 * PAIRS * SMALL.vision.training_tokens * (SMALL.vision.width + 4)
    assert 0 < of_kept <= of_whole / 3 + norm * (recompute == "selective")
    norms = held(Layout(1), recompute=recompute, freeze={"vision": {"norms": True}}).activations[0]
    assert sum(kept.values()) < sum(norms.values()) < sum(whole.values()) or recompute == "full"


FROZEN_STAGE = {"vision": "all", "text": {"unlocked_groups": 1}}


@pytest.mark.parametrize(
    ("model", "layout", "recompute", "freeze", "ema"),
    [
        *product(
            [SMALL],
            [Layout(2, tensor=2), Layout(2, tensor=2, sequence=True)],
            ["none", "selective", "full"],
            [None],
            [None],
        ),
        (SMALL, Layout(3, tensor=3, sequence=True), "selective", None, None),
        (SMALL, Layout(2), "none", None, 0.9),
        (SIGLIP, Layout(2, tensor=2, sequence=True), "selective", None, None),
        (PE_CORE, Layout(2, tensor=2), "none", None, None),
        (SMALL, Layout(4, tensor=2, pipeline=2, sequence=True), "none", FROZEN_STAGE, None),
        (SMALL, Layout(2, pipeline=2), "selective", FROZEN_STAGE, 0.9),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_real_processes_hold_the_same(tmp_path, model, layout, recompute, freeze, ema):
    torch.multiprocessing.start_processes(
        _count_for_real,
        (layout, model, recompute, freeze, ema, tmp_path),
        nprocs=layout.world,
        start_method="fork",
    )
    zero = layout.data > 1
    config = config_for(layout, recompute=recompute, zero=zero, freeze=freeze, ema=ema)
    for rank in range(layout.world):
        real = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        dry = dry_run(config, model, plan_for(config, model), rank)
        assert dataclasses.asdict(real) == dataclasses.asdict(dry)
        if freeze is not None and rank < layout.tensor:  # nothing of the first stage is trained
            assert (real.gradients, real.optimizer, real.saved) == (0, 0, 0)


def _count_for_real(rank, layout, model, recompute, freeze, ema, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=layout.world
    )
    join_world(Launch(rank, rank, layout.world))
    zero = layout.data > 1
    config = config_for(layout, recompute=recompute, zero=zero, freeze=freeze, ema=ema)
    found = measure_rank_memory(config, model, plan_for(config, model), make_groups(layout))
    torch.save(found, folder / f"{rank}.pt")
    close_groups()
