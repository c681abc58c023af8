"""Timelines, against one drawn by hand, the rules read off the spans, and formulas of pipelines."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.errors import InputError
from parallel_clip.pipeline.orders import (
    OpKind,
    PipelineOp,
    microbatch_group_size,
    step_orders,
)
from parallel_clip.pipeline.timeline import (
    Costs,
    ideal_step_seconds,
    simulate,
)

# Whole seconds, so that sums are exact: of a forward and a backward on each virtual stage.
PACES = [(1, 2), (1, 1), (3, 1), (2, 7)]
FIRST_PASS = (OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_KEEPING_GRAPH)


def equal(stages, forward, backward):
    return Costs([forward] * stages, [backward] * stages)


def uneven(layers, seconds_a_layer):
    forward = [seconds_a_layer * count for count in layers]
    return Costs(forward, [2 * seconds for seconds in forward])


@st.composite
def simulations(draw):
    """(ranks, microbatches, stash, chunks), costs, seconds of the loss."""
    ranks = draw(st.integers(1, 4))
    chunks = draw(st.integers(1, 3)) if ranks > 1 else 1
    microbatches = draw(st.integers(ranks if chunks > 1 else 1, 8))
    stash = draw(st.integers(0, microbatches))
    stages = ranks * chunks
    seconds = st.lists(st.integers(0, 9), min_size=stages, max_size=stages)
    costs = st.builds(Costs, seconds, seconds, st.integers(0, 4), st.none() | seconds)
    return (ranks, microbatches, stash, chunks), draw(costs), draw(st.integers(0, 9))


def test_a_timeline_drawn_by_hand():
    timeline = simulate(step_orders(ranks=2, microbatches=2), equal(2, 1, 2), loss=1)
    drawn = [(s.rank, s.op.kind.value, s.op.microbatch, s.start, s.end) for s in timeline.spans]
    assert drawn == [
        (0, "forward without graph", 0, 0, 1),
        (0, "forward without graph", 1, 1, 2),
        (0, "forward again", 0, 2, 3),
        (0, "forward again", 1, 3, 4),
        (0, "backward", 0, 7, 9),
        (0, "backward", 1, 10, 12),
        (1, "forward without graph", 0, 1, 2),
        (1, "forward without graph", 1, 2, 3),
        (1, "loss", 0, 3, 4),
        (1, "forward again", 0, 4, 5),
        (1, "backward", 0, 5, 7),
        (1, "forward again", 1, 7, 8),
        (1, "backward", 1, 8, 10),
    ]
    assert (timeline.total, timeline.busy, timeline.wait) == (12, [8, 9], [4, 3])
    assert timeline.bubble == pytest.approx(7 / 24)
    assert timeline.messages == 6


def assert_ops_start_as_early_as_allowed(timeline, orders, stages, message_seconds):
    """By their rank, which does one thing at a time, and by their input, which has to come."""
    ranks = len(orders)

    def stage_of(span):
        return span.op.chunk * ranks + span.rank

    def content_of(op):
        if op.kind is OpKind.BACKWARD:
            return "gradients"
        return "pass 1" if op.kind in FIRST_PASS else "pass 2"

    made = {
        (content_of(s.op), stage_of(s), s.op.microbatch): s.end
        for s in timeline.spans
        if s.op.kind is not OpKind.LOSS
    }
    for rank, order in enumerate(orders):
        spans = [span for span in timeline.spans if span.rank == rank]
        assert [span.op for span in spans] == order
        free = 0
        for span in spans:
            earliest, content, stage = free, content_of(span.op), stage_of(span)
            source = stage + 1 if content == "gradients" else stage - 1
            if span.op.kind is OpKind.LOSS:
                done = [end for key, end in made.items() if key[:2] == ("pass 1", stages - 1)]
                earliest = max(earliest, *done)
            elif 0 <= source < stages:
                sent = made[content, source, span.op.microbatch]
                earliest = max(earliest, sent + message_seconds(span.op))
            assert span.start == earliest
            free = span.end


@given(simulations())
def test_every_op_starts_as_early_as_its_rank_and_its_input_allow(simulation):
    step, costs, loss = simulation
    orders = step_orders(*step)
    timeline = simulate(orders, costs, loss)

    def message_seconds(op):
        return costs.message

    assert_ops_start_as_early_as_allowed(timeline, orders, step[0] * step[3], message_seconds)


@given(simulations())
def test_no_step_beats_its_work_or_the_way_of_one_microbatch(simulation):
    step, costs, loss = simulation
    ranks, microbatches, stash, chunks = step
    timeline = simulate(step_orders(*step), costs, loss)
    work = [0.0] * ranks
    ways = []
    without = costs.forward_without_graph or costs.forward
    again = microbatches - stash
    for stage, (f, b, w) in enumerate(zip(costs.forward, costs.backward, without, strict=True)):
        work[stage % ranks] += again * (w + f + b) + stash * (f + b)
    hops = 2 * (ranks * chunks - 1) * costs.message
    if stash:
        ways.append(sum(costs.forward) + loss + sum(costs.backward) + hops)
    if again:
        ways.append(sum(without) + loss + costs.forward[-1] + sum(costs.backward) + hops)
    work[-1] += loss
    assert timeline.busy == work
    assert timeline.total >= max(*work, *ways)
    assert timeline.total == max(span.end for span in timeline.spans)
    assert timeline.total <= sum(work) + timeline.messages * costs.message
    assert 0 <= timeline.bubble < 1


@given(simulations())
def test_messages_cross_every_border_in_both_passes(simulation):
    (ranks, microbatches, stash, chunks), costs, _ = simulation
    orders = step_orders(ranks, microbatches, stash, chunks)
    borders = ranks * chunks - 1
    assert simulate(orders, costs).messages == 3 * microbatches * borders


def test_pass_2_begins_while_later_ranks_finish_pass_1():
    timeline = simulate(step_orders(ranks=4, microbatches=4), equal(4, 1, 2), loss=5)
    loss = next(span for span in timeline.spans if span.op.kind is OpKind.LOSS)
    again = [span for span in timeline.spans if span.op.kind is OpKind.FORWARD_AGAIN]
    assert min(span.start for span in again) == 4 < loss.start == 7
    assert all(s.start >= loss.end for s in timeline.spans if s.op.kind is OpKind.BACKWARD)


@pytest.mark.parametrize(("forward", "backward"), PACES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 7])
def test_a_step_of_equal_stages_for_every_stash(ranks, microbatches, forward, backward):
    costs, loss = equal(ranks, forward, backward), 4
    for stash in range(microbatches + 1):
        total = simulate(step_orders(ranks, microbatches, stash), costs, loss).total
        ideal = ideal_step_seconds(ranks, microbatches, forward, backward, stash)
        assert total == ideal + loss
        fill_and_drain = (ranks - 1) * (forward + backward)
        forwards = microbatches + (microbatches - stash)
        assert ideal == forwards * forward + microbatches * backward + fill_and_drain


@pytest.mark.parametrize(("forward", "backward"), PACES)
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 5), (3, 7), (4, 8), (3, 5)])
def test_interleaved_steps_of_equal_stages(ranks, microbatches, chunks, forward, backward):
    costs = equal(ranks * chunks, forward, backward)
    of_a_rank = (chunks * forward, chunks * backward)  # all its chunks together
    group = microbatch_group_size(microbatches, ranks)
    for stash in range(microbatches + 1):
        total = simulate(step_orders(ranks, microbatches, stash, chunks), costs).total
        ideal = ideal_step_seconds(ranks, microbatches, *of_a_rank, stash=stash, chunks=chunks)
        stall = total - ideal
        if (microbatches - stash) % group == 0:
            assert stall == pytest.approx(0)
        assert -1e-9 < stall < (chunks - 1) * (ranks - 1) * forward + 1e-9


def test_a_stash_that_splits_a_group_stalls_an_interleaved_pipeline():
    costs = equal(8, 1, 2)
    totals = [simulate(step_orders(4, 8, stash, chunks=2), costs).total for stash in (4, 7, 8)]
    ideals = [ideal_step_seconds(4, 8, 2, 4, stash, chunks=2) for stash in (4, 7, 8)]
    assert [total - ideal for total, ideal in zip(totals, ideals, strict=True)] == [0, 3, 0]


def test_each_stashed_microbatch_saves_a_forward():
    totals = [simulate(step_orders(3, 6, k), equal(3, 2, 4)).total for k in range(7)]
    assert [before - after for before, after in pairwise(totals)] == [2] * 6


def test_a_forward_without_graph_has_its_own_cost():
    costs = Costs([5, 5], [7, 7], forward_without_graph=[3, 3])
    assert simulate(step_orders(2, 4), costs).busy == [4 * (3 + 5 + 7)] * 2
    assert simulate(step_orders(2, 4, stash=4), costs).busy == [4 * (5 + 7)] * 2


def test_a_step_that_takes_no_time_has_no_bubble():
    assert simulate(step_orders(2, 2), equal(2, 0, 0)).bubble == 0


@pytest.mark.parametrize(
    "costs",
    [
        Costs([1, 1, 1], [1, 1, 1]),
        Costs([1, 1], [1]),
        Costs([1, 1], [1, 1], forward_without_graph=[1]),
    ],
)
def test_costs_for_another_pipeline(costs):
    with pytest.raises(InputError, match="for a pipeline of 2"):
        simulate(step_orders(ranks=2, microbatches=1), costs)


def test_orders_that_wait_for_ever():
    orders = [[], [PipelineOp(OpKind.FORWARD_WITHOUT_GRAPH)]]
    with pytest.raises(ValueError, match="no rank can go on"):
        simulate(orders, equal(2, 1, 1))
