"""Memory at a step's fullest moment: counted on fake tensors, counted in real processes, and by the
quick arithmetic of the planner."""

import pytest
import torch

from parallel_clip.data.samples.transforms import Preprocess, normalize
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.rank_bytes import StepMemory
from parallel_clip.plan.rank_process import GPU_PROCESS
from parallel_clip.plan.step_peak import StepPeak, count_step, measure_step
from tests.plan.random_layouts import RandomLayout, random_layouts
from tests.plan.test_fast_memory import PE_CORE, SIGLIP, SMALL, config_for

CASES = [
    (SMALL, Layout(1), {"recompute": "selective", "ema": {"decay": 0.9}}),
    (SMALL, Layout(2), {"precision": "fp32", "loss": {"kind": "sigmoid"}, "stash": 2}),
    (SMALL, Layout(4, tensor=2, pipeline=2, sequence=True), {"recompute": "full"}),
    (SIGLIP, Layout(2, tensor=2, sequence=True), {"precision": "fp32"}),
    (SMALL, Layout(2, pipeline=2, virtual_pipeline=2), {"captions": 2}),
    (SMALL, Layout(2, pipeline=2), {"freeze": {"text": "all"}, "stash": 4}),
    # Nothing of the first stage goes backward.
    (SMALL, Layout(2, pipeline=2), {"freeze": {"vision": {"unlocked_groups": 3}, "text": "all"}}),
    (PE_CORE, Layout(2, tensor=2), {"recompute": "selective", "zero": False}),
]
MICRO = 24


def of_case(model, layout: Layout, settings: dict) -> RandomLayout:
    settings = dict(settings)
    parallel = {"schedule": "auto", "stash": settings.pop("stash", 0)}
    config = config_for(layout, MICRO, **settings)
    parallel = config.parallel.model_copy(update=parallel)
    config = config.model_copy(update={"parallel": parallel})
    return RandomLayout(config, model, make_layout_plan(model.costs, layout.world, config))


def really_held(groups: Groups, case: RandomLayout) -> StepPeak:
    return measure_step(*case, groups)


def held_for_real(groups: Groups, trained: RandomLayout) -> StepPeak:
    return measure_step(*trained, groups)


def predicted(case: RandomLayout) -> list[int]:
    """By the planner, of the tensors on each stage."""
    config, model, plan = case
    memory = FastMemory(config, model)
    step = StepMemory(plan, memory.stages(config, plan), memory, config.recompute, GPU_PROCESS)
    found = [step.of_stage(rank, plan.stash) for rank in range(plan.layout.pipeline)]
    return [each.tensors for each in found]


def assert_close(predicted: int, counted: int, case: RandomLayout) -> None:
    """To 2%, and never more than 1% too little."""
    assert 0.99 * counted <= predicted <= 1.02 * counted, f"{case}: {predicted / counted:.4f}"


@pytest.mark.parametrize(
    ("model", "layout", "settings"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
def test_counted_on_fake_tensors_in_real_processes_and_by_the_planner(
    processes, model, layout, settings
):
    case = of_case(model, layout, settings)
    real = processes.run(layout, held_for_real, trained=case)
    counted = [count_step(*case, rank) for rank in range(layout.world)]
    for fake, held in zip(counted, real, strict=True):
        assert fake.state == pytest.approx(held.state, rel=1e-3)
        # A thread of gloo's lets go of a message when it comes to it.
        assert fake.total == pytest.approx(held.total, rel=0.03)
    assert_close(max(predicted(case)), max(each.total for each in counted), case)


def test_nothing_fake_is_left_behind():
    """Such as constants that a process keeps for all pictures of a device."""
    count_step(*of_case(SMALL, Layout(1), {}), 0)
    pictures = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    preprocess = Preprocess((2, 2), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert normalize(pictures, preprocess).eq(1).all()
    assert normalize(pictures, Preprocess(SMALL.vision.image_size)).gt(1.9).all()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_the_planner_predicts_what_is_counted_in_any_layout(seed):
    """The fullest stage of layouts of full-size models on up to 1,024 ranks."""
    for case in random_layouts(seed, 5):
        layout = case.plan.layout
        ranks_in_stage = layout.data * layout.tensor
        first_ranks = range(0, layout.world, ranks_in_stage)
        counted = max(count_step(*case, rank).total for rank in first_ranks)
        assert_close(max(predicted(case)), counted, case)
