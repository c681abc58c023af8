"""The quick memory of stages against `count_stages`, which runs the code of a whole stage: to the
byte."""

import dataclasses

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.layout import Layout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.gradient_buffers import buffer_size
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import count_stages, dry_run
from tests.small_models import KINDS

TOWER = {"width": 32, "layers": 7, "heads": 4}
SMALL = architecture_from_json(
    {
        "embed_dim": 24,
        "vision_cfg": {
            **{"image_size": 32, "patch_size": 8, "width": 64, "layers": 9, "head_width": 16},
            "patch_dropout": 0.3,
        },
        "text_cfg": {**TOWER, "context_length": 13, "vocab_size": 101},
    },
    "small",
)
SIGLIP, PE_CORE = (
    architecture_from_json(KINDS[kind], kind) for kind in ("timm-siglip", "timm-pe-core")
)
PARTLY = {"vision": {"unlocked_groups": 5, "norms": True}, "text": {"unlocked_groups": 4}}


def config_for(layout: Layout, micro=5, count=4, **settings):
    parallel = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "sequence": layout.sequence,
        "pad": layout.tensor == 3,
        "distributed_optimizer": settings.pop("zero", True),
    }
    return config_from_dict(
        {
            "train": {"steps": 1},
            "data": {
                "train": [{"shards": "none.tar", "caption_lines": True}],
                "captions_per_image": settings.pop("captions", 1),
            },
            "batch": {"global": micro * count * layout.data, "micro": micro},
            "precision": "bf16",
            "parallel": parallel,
            **settings,
        }
    )


@pytest.mark.parametrize(
    ("model", "layout", "settings"),
    [
        (SMALL, Layout(1), {"ema": {"decay": 0.9}}),
        (SMALL, Layout(4, tensor=2, sequence=True), {"recompute": "selective"}),
        (SMALL, Layout(6, tensor=3, sequence=True), {"recompute": "full", "zero": False}),
        (SMALL, Layout(8, pipeline=4), {"precision": "fp32"}),
        (SMALL, Layout(4, pipeline=2, virtual_pipeline=3), {"recompute": "selective"}),
        (SMALL, Layout(2, pipeline=2), {"freeze": PARTLY, "recompute": "selective"}),
        (SMALL, Layout(2, pipeline=2), {"freeze": {"vision": "all"}}),
        (SIGLIP, Layout(2, tensor=2, sequence=True), {"recompute": "selective"}),
        (PE_CORE, Layout(4, tensor=2, pipeline=2), {"micro": 1}),
        (SMALL, Layout(2, pipeline=2), {"captions": 3}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_small_models_to_the_byte(model, layout, settings):
    config = config_for(layout, **settings)
    plan = make_layout_plan(model.costs, layout.world, config)
    fast, counted = (
        FastMemory(config, model).stages(config, plan),
        count_stages(config, model, plan),
    )
    assert [_sums(held) for held in fast] == [_sums(held) for held in counted]


@pytest.mark.long
def test_a_stage_of_a_large_model_to_the_byte():
    """With a buffer of several buckets."""
    model, layout = load_architecture("ViT-L-14"), Layout(8, tensor=2, pipeline=2, sequence=True)
    config = config_for(layout, micro=32)
    plan = make_layout_plan(model.costs, layout.world, config)
    fast = FastMemory(config, model).stages(config, plan)
    assert _sums(fast[0]) == _sums(dry_run(config, model, plan))


def test_one_memory_serves_layouts_of_other_sizes():
    first = config_for(Layout(2, tensor=2, sequence=True))
    memory = FastMemory(first, SMALL)
    memory.stages(first, make_layout_plan(SMALL.costs, 2, first))
    other = config_for(Layout(4, pipeline=4), micro=3, recompute="full")
    plan = make_layout_plan(SMALL.costs, 4, other)
    assert memory.stages(other, plan) == FastMemory(other, SMALL).stages(other, plan)


def test_buckets_are_cut_and_padded():
    whole = buffer_size([100, 70, 30], 3, splits_state=False, first_stage=True)
    assert (whole.numbers, whole.owned) == (200, (100, 70, 30))
    # The last comes first, at 0; then 64 and 192; up to a multiple of 3 × 128.
    split = buffer_size([100, 70, 30], 3, splits_state=True, first_stage=True)
    assert (split.numbers, split.owned) == (384, (0, 64, 30))
    large = 40_000_000
    first = buffer_size([64, large], 2, splits_state=True, first_stage=True)
    assert first.owned == (64, large // 2), "two buckets, of the second of which a half is padding"
    later = buffer_size([64, large], 2, splits_state=True, first_stage=False)
    assert later.owned == (0, large // 2 + 64)


def _sums(held) -> dict:
    fields = dataclasses.asdict(held)
    return {**fields, "activations": held.saved_by_chunk}
