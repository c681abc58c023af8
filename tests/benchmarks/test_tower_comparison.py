"""Two towers on one pipeline, in each op or in turns; and passes of 1F1B alone."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.pipeline.orders import OpKind, PipelineOp, peak_graphs
from parallel_clip.pipeline.timeline import Costs, ideal_step_seconds, simulate
from tests.pipeline.test_orders import assert_backwards_follow_their_forwards, steps
from tests.pipeline.test_timeline import (
    PACES,
    assert_ops_start_as_early_as_allowed,
    equal,
    simulations,
    uneven,
)

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from tower_comparison import (
        CostsInTurns,
        compare_towers,
        ideal_one_pass_seconds,
        one_pass_orders,
        orders_in_turns,
    )


@st.composite
def simulations_in_turns(draw):
    """(ranks, microbatches, stash, chunks), costs of two towers, seconds of the loss."""
    step, vision, loss = draw(simulations())
    stages = step[0] * step[3]
    seconds = st.lists(st.integers(0, 9), min_size=stages, max_size=stages)
    text = st.builds(Costs, seconds, seconds, st.integers(0, 4), st.none() | seconds)
    return step, CostsInTurns(vision, draw(text), step[1]), loss


@given(steps())
def test_two_towers_run_each_op_once(step):
    ranks, microbatches, stash, chunks = step
    for rank, order in enumerate(orders_in_turns(*step)):
        expected = Counter([PipelineOp(OpKind.LOSS)] * (rank == ranks - 1))
        for first in (0, microbatches):
            for chunk in range(chunks):
                for microbatch in range(microbatches):
                    if microbatch < microbatches - stash:
                        kinds = OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_AGAIN, OpKind.BACKWARD
                    else:
                        kinds = OpKind.FORWARD_KEEPING_GRAPH, OpKind.REPLAY, OpKind.BACKWARD
                    expected.update(PipelineOp(kind, first + microbatch, chunk) for kind in kinds)
        assert Counter(order) == expected


@given(steps())
def test_a_backward_follows_the_forward_of_its_tower(step):
    for order in orders_in_turns(*step):
        assert_backwards_follow_their_forwards(order)


def test_towers_take_turns_around_the_loss():
    order = orders_in_turns(ranks=2, microbatches=2)[-1]
    loss = order.index(PipelineOp(OpKind.LOSS))
    assert [op.microbatch // 2 for op in order[:loss]] == [0, 0, 1, 1]
    assert [op.microbatch // 2 for op in order[loss + 1 :]] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_peak_graphs_of_two_towers_in_turn_are_of_one_at_a_time():
    orders = orders_in_turns(ranks=3, microbatches=6)
    assert [peak_graphs(order) for order in orders] == [3, 2, 1]


@given(simulations_in_turns())
def test_ops_of_towers_start_as_early_as_their_rank_and_input_allow(simulation):
    step, towers, loss = simulation
    orders = orders_in_turns(*step)
    timeline = simulate(orders, towers, loss)

    def message_seconds(op):
        return (towers.vision if op.microbatch < step[1] else towers.text).message

    assert_ops_start_as_early_as_allowed(timeline, orders, step[0] * step[3], message_seconds)


@given(simulations_in_turns())
def test_no_step_of_towers_beats_its_work_or_the_way_of_one_microbatch(simulation):
    step, in_turns, loss = simulation
    ranks, microbatches, stash, chunks = step
    timeline = simulate(orders_in_turns(*step), in_turns, loss)
    work = [0.0] * ranks
    ways = []
    for costs in (in_turns.vision, in_turns.text):
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
    one_after_another = timeline.messages * max(in_turns.vision.message, in_turns.text.message)
    assert timeline.total <= sum(work) + one_after_another
    assert 0 <= timeline.bubble < 1


@given(simulations_in_turns())
def test_messages_of_towers_cross_every_border_in_both_passes(simulation):
    (ranks, microbatches, stash, chunks), towers, _ = simulation
    orders = orders_in_turns(ranks, microbatches, stash, chunks)
    borders = ranks * chunks - 1
    assert simulate(orders, towers).messages == 2 * 3 * microbatches * borders


def test_a_single_pass_is_forwards_and_backwards_only():
    (order,) = one_pass_orders(ranks=1, microbatches=2)
    assert [(op.kind.value, op.microbatch) for op in order] == [
        ("forward keeping graph", 0),
        ("backward", 0),
        ("forward keeping graph", 1),
        ("backward", 1),
    ]


@pytest.mark.parametrize(("forward", "backward"), PACES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 9])
def test_one_pass_of_equal_stages(ranks, microbatches, forward, backward):
    timeline = simulate(one_pass_orders(ranks, microbatches), equal(ranks, forward, backward))
    assert timeline.total == (microbatches + ranks - 1) * (forward + backward)
    assert timeline.total == ideal_one_pass_seconds(ranks, microbatches, forward, backward)
    # Narayanan et al., arXiv 2104.04473, section 2.2.1: bubble time over ideal time is (p - 1) / m.
    assert 1 - timeline.bubble == pytest.approx(microbatches / (microbatches + ranks - 1))


@pytest.mark.parametrize(("forward", "backward"), PACES)
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 5), (3, 7), (4, 8), (3, 5)])
def test_one_interleaved_pass_of_equal_stages(ranks, microbatches, chunks, forward, backward):
    costs = equal(ranks * chunks, forward, backward)
    of_a_rank = (chunks * forward, chunks * backward)  # all its chunks together
    one_pass = simulate(one_pass_orders(ranks, microbatches, chunks), costs).total
    fill_and_drain = (ranks - 1) * (forward + backward)
    assert one_pass == microbatches * sum(of_a_rank) + fill_and_drain
    ideal = ideal_one_pass_seconds(ranks, microbatches, *of_a_rank, chunks=chunks)
    assert one_pass == pytest.approx(ideal)


@pytest.mark.parametrize("microbatches", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_towers_take_as_long_fused_as_in_turn(ranks, microbatches):
    vision, text = equal(ranks, 3, 5), equal(ranks, 1, 2)
    towers = compare_towers(vision, text, ranks, microbatches)
    assert towers.fused.total == towers.separate.total
    assert towers.speedup == 1
    stashed = compare_towers(vision, text, ranks, microbatches, stash=microbatches)
    assert stashed.fused.total - stashed.separate.total == (ranks - 1) * 1


def test_fused_towers_even_out_what_separate_ones_cannot():
    # A vision layer costs two text layers. 5 and 2 layers on 3 ranks: v + t is 4, 4, 4 fused; each
    # by itself is at best 4, 4, 2 and 1, 1, 0.
    fused_vision, fused_text = uneven([2, 2, 1], 2), uneven([0, 0, 2], 1)
    towers = compare_towers(fused_vision, fused_text, ranks=3, microbatches=32)
    assert towers.fused.total == ideal_step_seconds(3, 32, 4, 8)
    assert towers.speedup > 1.4
    assert towers.separate.messages == 2 * towers.fused.messages

    best_apart = compare_towers(uneven([2, 2, 1], 2), uneven([1, 1, 0], 1), 3, 32).separate
    assert 1.2 < best_apart.total / towers.fused.total < 1.25


def test_fused_costs_are_the_towers_together():
    vision = Costs([3], [5], message=1, forward_without_graph=[2])
    towers = compare_towers(vision, Costs([10], [20], message=4), ranks=1, microbatches=1, loss=7)
    assert towers.fused.total == (2 + 10) + 7 + (3 + 10) + (5 + 20)
    across = compare_towers(equal(2, 1, 1), Costs([1, 1], [1, 1], message=4), 2, 1).fused
    # One microbatch: there in pass 1, its forward again, and back; a message each way.
    assert across.total == (2 + 4 + 2) + 2 + (2 + 4 + 2)
