"""Two ways to lay two towers on a pipeline, by arithmetic: both in each op, or in turns.

In turns each tower is a pipeline of its own: pass 1 of vision, pass 1 of text, the loss, pass 2 of
vision, pass 2 of text. Their ops are told apart by their microbatches: vision has 0 to m - 1, text
m to 2m - 1. And 1F1B in a single pass, for losses that split over microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel_clip.pipeline.orders import OpKind, PipelineOp, step_orders
from parallel_clip.pipeline.timeline import Costs, Timeline, simulate

FIRST_PASS = (OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_KEEPING_GRAPH)


def orders_in_turns(
    ranks: int, microbatches: int, stash: int = 0, chunks: int = 1
) -> list[list[PipelineOp]]:
    """The ops of a step of two towers in turns, for each rank.

    Raises:
        InputError: as `step_orders`.
    """
    orders = []
    for vision in step_orders(ranks, microbatches, stash, chunks):
        loss = [op for op in vision if op.kind is OpKind.LOSS]
        first = [op for op in vision if op.kind in FIRST_PASS]
        second = vision[len(first) + len(loss) :]
        text_first, text_second = (
            [op._replace(microbatch=op.microbatch + microbatches) for op in ops]
            for ops in (first, second)
        )
        orders.append(first + text_first + loss + second + text_second)
    return orders


@dataclass(frozen=True)
class CostsInTurns:
    """Takes the place of `Costs` for `orders_in_turns`."""

    vision: Costs
    text: Costs
    microbatches: int

    def of(self, op: PipelineOp) -> Costs:
        """The costs of the tower that an op is of."""
        return self.vision if op.microbatch < self.microbatches else self.text

    def check_stages(self, stages: int) -> None:
        self.vision.check_stages(stages)
        self.text.check_stages(stages)

    def seconds(self, op: PipelineOp, stage: int) -> float:
        return self.of(op).seconds(op, stage)

    def message_seconds(self, op: PipelineOp) -> float:
        return self.of(op).message


class TowerComparison(NamedTuple):
    """A step of two towers: as one pipeline, and as two that take turns on the same ranks."""

    fused: Timeline
    separate: Timeline

    @property
    def speedup(self) -> float:
        """The separate pipelines' time divided by the fused one's."""
        return self.separate.total / self.fused.total


def compare_towers(
    vision: Costs,
    text: Costs,
    ranks: int,
    microbatches: int,
    stash: int = 0,
    chunks: int = 1,
    loss: float = 0.0,
) -> TowerComparison:
    """Both towers in each op, against the towers in turns.

    A fused op and a fused message take the two towers' seconds together; there are half as many of
    either. Per microbatch the fused pipeline advances at the pace max(v + t) over ranks, separate
    ones at max v + max t, which is more where the towers' deepest stages are on different ranks.
    With equal stages, instant messages and no stash they are equal where a text forward takes no
    longer than a vision forward. With everything stashed separate ones are then faster, by P - 1
    text forwards: pass 2 of the text tower fills by replays, in no time.

    Raises:
        InputError: as `step_orders` and `simulate`.
    """
    size = (ranks, microbatches, stash, chunks)
    separate = simulate(orders_in_turns(*size), CostsInTurns(vision, text, microbatches), loss)
    return TowerComparison(simulate(step_orders(*size), _together(vision, text), loss), separate)


def one_pass_orders(ranks: int, microbatches: int, chunks: int = 1) -> list[list[PipelineOp]]:
    """The ops of a single pass of 1F1B, for each rank: a loss that splits over microbatches.

    Raises:
        InputError: as `step_orders`.
    """
    kinds = {
        OpKind.FORWARD_AGAIN: OpKind.FORWARD_KEEPING_GRAPH,
        OpKind.BACKWARD: OpKind.BACKWARD,
    }
    return [
        [op._replace(kind=kinds[op.kind]) for op in order if op.kind in kinds]
        for order in step_orders(ranks, microbatches, chunks=chunks)
    ]


def ideal_one_pass_seconds(
    ranks: int, microbatches: int, forward: float, backward: float, chunks: int = 1
) -> float:
    """A pass of 1F1B over equal stages with instant messages: m (f + b) + (P - 1)(f + b) / V.

    f and b are a rank's seconds for one microbatch in all its V chunks. The last rank begins when
    P - 1 forwards of one chunk are done, works without a pause, and P - 1 backwards of one chunk
    follow. With V = 1 it is (m + P - 1)(f + b), an efficiency of m / (m + P - 1). Narayanan et al.,
    arXiv 2104.04473, section 2.2; they have it for m a multiple of P, and it holds for every m that
    the schedule takes.
    """
    return (microbatches + (ranks - 1) / chunks) * (forward + backward)


def _together(vision: Costs, text: Costs) -> Costs:
    def without_graph(costs: Costs) -> Sequence[float]:
        apart = costs.forward_without_graph
        return costs.forward if apart is None else apart

    def added(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [of_a + of_b for of_a, of_b in zip(a, b, strict=True)]

    return Costs(
        forward=added(vision.forward, text.forward),
        backward=added(vision.backward, text.backward),
        message=vision.message + text.message,
        forward_without_graph=added(without_graph(vision), without_graph(text)),
    )
