"""What each stage holds, against the whole model and the arithmetic of 1F1B."""

import pytest

from parallel_clip.plan.memory import dry_run
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.plan.stage_estimate import StageEstimate, estimate_step, step_timeline
from parallel_clip.stages.costs import stage_cost
from parallel_clip.stages.stage import whole_model
from tests.plan.small_plans import PAIRS, small_plan


def estimates(plan: RunPlan) -> list[StageEstimate]:
    return estimate_step(plan.layout_plan, plan.architecture.costs, plan.memory).stages


def test_the_stages_of_a_pipeline_are_the_whole_model(tmp_path):
    (alone,) = estimates(small_plan(tmp_path, 4, dry_run=True))
    found = estimates(small_plan(tmp_path, 4, pipeline=3, stash=2, dry_run=True))
    assert [[(s.vision.layers, s.text.layers) for s in stage.chunks] for stage in found] == [
        [(2, 2)]
    ] * 3
    assert sum(stage.held.parameters for stage in found) == alone.held.parameters
    assert sum(stage.flops for stage in found) == alone.flops
    for stage, graphs in zip(found, [4, 4, 3], strict=True):
        assert stage.peak_activations == graphs * stage.held.saved
        assert stage.peak == stage.held.state + stage.peak_activations + stage.peak_pictures
    # A message beside the hidden states of one layer more or less: the rest is the same graph.
    assert sum(stage.held.saved for stage in found) == pytest.approx(alone.held.saved, rel=0.06)


def test_the_work_of_a_rank_counts_its_padding_and_what_it_computes_whole(tmp_path):
    plan = small_plan(tmp_path, 4, pipeline=3, tensor=3, pad=True, dry_run=True)
    on_ranks, padded = (
        getattr(plan.architecture.costs, kind)(3) for kind in ("on_tensor_ranks", "padded")
    )
    flops = [stage_cost(stage, on_ranks) for stage in plan.layout_plan.stages]
    assert [estimate.flops for estimate in estimates(plan)] == flops
    first = plan.layout_plan.stages[0]
    assert flops[0] == stage_cost(first, padded) + 2 * padded.vision.embedding
    assert padded.total > plan.architecture.costs.total
    timeline = step_timeline(plan.layout_plan, plan.architecture.costs)
    assert timeline.total >= 4 * 3 * PAIRS * max(flops)


def test_pictures_are_the_first_stages_alone(tmp_path):
    first, *others = estimates(small_plan(tmp_path, 8, pipeline=3, stash=2, dry_run=True))
    assert first.held.pictures == PAIRS * 3 * 32 * 32 * 2, "bf16"
    ahead = PAIRS * 3 * 32 * 32  # as bytes
    assert first.peak_pictures == (2 + 3) * first.held.pictures + ahead, "stashed and in flight"
    assert [stage.peak_pictures for stage in others] == [0, 0]


def test_a_rank_holds_all_of_its_virtual_stages(tmp_path):
    plan = small_plan(tmp_path, 4, pipeline=2, virtual_pipeline=2, dry_run=True)
    first, second = estimates(plan)
    assert [stage.number for stage in first.chunks] == [0, 2]
    assert [stage.number for stage in second.chunks] == [1, 3]
    for rank in (first, second):
        assert len(rank.held.saved_by_chunk) == 2
        assert rank.held.saved == sum(rank.held.saved_by_chunk)
    # Interleaved in groups of 2 (Narayanan et al., section 2.2), chunks a and b: rank 0 runs
    # a a b b a, then backward b, forward a, and so on; rank 1 a a b, backward b, b, backward b, a.
    a, b = first.held.saved_by_chunk
    assert first.peak_activations == max(3 * a + 2 * b, 4 * a + b)
    a, b = second.held.saved_by_chunk
    assert second.peak_activations == max(2 * a + b, 3 * a)


def test_a_stage_is_that_of_its_first_rank(tmp_path):
    plan = small_plan(tmp_path, 2, data=3, tensor=2, pipeline=2, dry_run=True)
    last = dry_run(plan.config, plan.architecture, plan.layout_plan, rank=11)
    assert plan.memory[1] == last != plan.memory[0]


@pytest.mark.parametrize(("stash", "forwards"), [(0, 8), (1, 7), (4, 4)])
def test_a_step_is_as_long_as_its_forwards_and_its_backwards_of_twice_the_work(
    tmp_path, stash, forwards
):
    plan = small_plan(tmp_path, 4, stash=stash)
    costs = plan.architecture.costs
    timeline = step_timeline(plan.layout_plan, costs)
    alone = whole_model(costs.vision.layers, costs.text.layers)
    assert timeline.total == (forwards + 2 * 4) * PAIRS * stage_cost(alone, costs)
    assert timeline.bubble == 0
