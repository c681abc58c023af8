"""Seconds of a step's ops over its pipeline, by pipeline/timeline.py; long steps in short ones.

A pipeline soon settles into a rhythm, so that each further group of P microbatches takes the same
time. The timeline of a long step is therefore that of a short one, and so many times the difference
that P microbatches more make to it: exact for even stages, within 1% for such as differ by 25%,
within 1.5% from 16 stages on.
"""

from __future__ import annotations

from functools import lru_cache

from parallel_clip.pipeline.orders import OpKind, microbatch_group_size, step_orders
from parallel_clip.pipeline.timeline import Costs, in_order

# So many times P microbatches, of each kind, are simulated as they are; in deep pipelines fewer, as
# ops grow with the square of their depth.
SETTLED, SETTLED_DEEP = 3, 2
DEEP = 16


def pipeline_seconds(
    ranks: int, chunks: int, microbatches: int, stash: int, costs: Costs, loss: float
) -> float:
    """The time in which all microbatches have been forward and backward, the loss included.

    costs: of the ranks × chunks virtual stages, those of a second forward pass given; loss: on the
    last rank.
    """
    without = microbatches - stash
    if ranks == 1:  # one after another
        once = sum(costs.forward) + sum(costs.backward)
        return microbatches * once + without * sum(costs.forward_again) + loss
    seconds = tuple(costs.forward), tuple(costs.backward), tuple(costs.forward_again)
    of_step = ranks, chunks, *seconds, costs.message, loss
    if chunks > 1 and (stash % ranks or microbatch_group_size(microbatches, ranks) != ranks):
        return _simulated(without, stash, *of_step)  # groups of other sizes do not repeat so
    (few, groups), (few_stashed, groups_stashed) = (
        _shortened(without, ranks),
        _shortened(stash, ranks),
    )
    base = total = _simulated(few, few_stashed, *of_step)
    if groups:
        total += groups * (_simulated(few + ranks, few_stashed, *of_step) - base)
    if groups_stashed:
        total += groups_stashed * (_simulated(few, few_stashed + ranks, *of_step) - base)
    return total


def _shortened(count: int, ranks: int) -> tuple[int, float]:
    """So few microbatches in place of `count`, and how many times `ranks` these are fewer. Of a
    long step always as many, so that few orders of ops are computed for a search."""
    few = (SETTLED_DEEP if ranks >= DEEP else SETTLED) * ranks
    return (few, (count - few) / ranks) if count >= few + ranks else (count, 0.0)


def _simulated(
    without: int,
    stash: int,
    ranks: int,
    chunks: int,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    again: tuple[float, ...],
    message: float,
    loss: float,
) -> float:
    """`simulate(...).total` of a step of which `stash` microbatches keep their graphs and `without`
    do not, without a record of what each op did."""
    seconds = {
        OpKind.FORWARD_WITHOUT_GRAPH: forward,
        OpKind.FORWARD_KEEPING_GRAPH: forward,
        OpKind.FORWARD_AGAIN: again,
        OpKind.REPLAY: (0.0,) * len(forward),
        OpKind.BACKWARD: backward,
        OpKind.LOSS: (loss,) * len(forward),
    }
    of_op = [of_stage for kind in OpKind for of_stage in seconds[kind]]
    clocks = [0.0] * ranks
    arrivals: list[float] = []
    for rank, sender, place in _compiled(ranks, chunks, without, stash):
        start = clocks[rank]
        if sender is not None and arrivals[sender] > start:
            start = arrivals[sender]
        clocks[rank] = end = start + of_op[place]
        arrivals.append(end + message)
    return max(clocks)


@lru_cache(maxsize=1024)
def _compiled(
    ranks: int, chunks: int, without: int, stash: int
) -> list[tuple[int, int | None, int]]:
    """Of each op its rank, the op that it waits for, and its place among the seconds of each kind
    and stage."""
    kinds, stages = {kind: number for number, kind in enumerate(OpKind)}, ranks * chunks
    placed = in_order(step_orders(ranks, without + stash, stash, chunks))
    return [(p.rank, p.sender, kinds[p.op.kind] * stages + p.stage) for p in placed]
