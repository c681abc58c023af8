"""What each stage holds, against the whole model and the arithmetic of 1F1B."""

import pytest

from parallel_clip.plan.memory import dry_run, stage_memory
from parallel_clip.plan.stages import stage_estimates
from parallel_clip.plan.step_time import step_timeline
from parallel_clip.stages.costs import stage_cost
from parallel_clip.stages.stage import whole_model
from tests.plan.plan_jobs import PAIRS, small_job


def test_the_stages_of_a_pipeline_are_the_whole_model(tmp_path):
    whole = small_job(tmp_path, 4)
    (alone,) = stage_estimates(whole)
    job = small_job(tmp_path, 4, pipeline=3, stash=2)
    loads = stage_estimates(job)
    assert [[(s.vision.layers, s.text.layers) for s in load.chunks] for load in loads] == [
        [(2, 2)]
    ] * 3
    assert sum(load.held.parameters for load in loads) == alone.held.parameters
    assert sum(load.flops for load in loads) == alone.flops
    for load, graphs in zip(loads, [4, 4, 3], strict=True):
        assert load.peak_activations == graphs * load.held.saved
        assert load.peak == load.held.state + load.peak_activations
    # A message beside the hidden states of one layer more or less: the rest is the same graph.
    assert sum(load.held.saved for load in loads) == pytest.approx(alone.held.saved, rel=0.06)


def test_a_rank_holds_all_of_its_virtual_stages(tmp_path):
    job = small_job(tmp_path, 4, pipeline=2, virtual_pipeline=2)
    first, second = stage_estimates(job)
    assert [stage.number for stage in first.chunks] == [0, 2]
    assert [stage.number for stage in second.chunks] == [1, 3]
    for load in (first, second):
        assert len(load.held.saved_by_chunk) == 2
        assert load.held.saved == sum(load.held.saved_by_chunk)
    # Interleaved in groups of 2 (Narayanan et al., section 2.2), chunks a and b: rank 0 runs
    # a a b b a, then backward b, forward a, and so on; rank 1 a a b, backward b, b, backward b, a.
    a, b = first.held.saved_by_chunk
    assert first.peak_activations == max(3 * a + 2 * b, 4 * a + b)
    a, b = second.held.saved_by_chunk
    assert second.peak_activations == max(2 * a + b, 3 * a)


def test_a_stage_is_that_of_its_first_rank(tmp_path):
    job = small_job(tmp_path, 2, data=3, tensor=2, pipeline=2)
    last = dry_run(job.config, job.architecture, job.layout, rank=11)
    assert stage_memory(job, 1) == last != stage_memory(job, 0)


@pytest.mark.parametrize(("stash", "forwards"), [(0, 8), (1, 7), (4, 4)])
def test_a_step_is_as_long_as_its_forwards_and_its_backwards_of_twice_the_work(
    tmp_path, stash, forwards
):
    job = small_job(tmp_path, 4, stash=stash)
    timeline = step_timeline(job)
    costs = job.architecture.costs
    forward = PAIRS * stage_cost(whole_model(costs.vision.layers, costs.text.layers), costs)
    assert timeline.total == (forwards + 2 * 4) * forward
    assert timeline.bubble == 0
