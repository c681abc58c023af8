"""The time of a step on a pipeline: a simulation of its ops, and closed forms for equal stages.

P pipeline ranks of V chunks each are Q = P × V virtual stages (see `orders`). Each op starts when
its rank has done the op before it and its input has arrived:

- the forward of stage q: that of stage q - 1 in the same pass, and a message;
- the backward of stage q: that of stage q + 1, and a message;
- the loss: pass 1 of every microbatch on the last stage, which precedes it on its own rank.

Nothing else waits for the loss, so the fill of pass 2 hides in the drain of pass 1. Buffers hold
any number of messages, and a message keeps no rank busy. A replay still receives and sends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.pipeline.orders import OpKind, PipelineOp


@dataclass(frozen=True)
class Costs:
    """Seconds of one microbatch: on each virtual stage q, and of a message between two of them.

    `forward_without_graph`, and `forward_again` in the second pass, are [Q] as the others; None
    where they equal `forward`.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    message: float = 0.0
    forward_without_graph: Sequence[float] | None = None
    forward_again: Sequence[float] | None = None

    def seconds(self, op: PipelineOp, stage: int) -> float:
        """Seconds of an op (any but the loss) on a virtual stage."""
        if op.kind is OpKind.REPLAY:
            return 0
        if op.kind is OpKind.BACKWARD:
            return self.backward[stage]
        if op.kind is OpKind.FORWARD_WITHOUT_GRAPH and self.forward_without_graph is not None:
            return self.forward_without_graph[stage]
        if op.kind is OpKind.FORWARD_AGAIN and self.forward_again is not None:
            return self.forward_again[stage]
        return self.forward[stage]

    def check_stages(self, stages: int) -> None:
        """Raises InputError where these are the costs of another number of virtual stages."""
        optional = self.forward_without_graph, self.forward_again
        for seconds in (self.forward, self.backward, *optional):
            if seconds is not None and len(seconds) != stages:
                raise InputError(
                    f"costs of {len(seconds)} virtual stages for a pipeline of {stages}; give one "
                    "number for each virtual stage"
                )

    def message_seconds(self, op: PipelineOp) -> float:
        """Seconds until what an op sends has arrived."""
        return self.message


class Span(NamedTuple):
    """When a rank ran an op, in seconds from the step's start."""

    rank: int
    op: PipelineOp
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Result of a simulated step. `spans` are by rank, then by time; `busy` is [P], in seconds."""

    spans: list[Span]
    total: float
    busy: list[float]
    messages: int

    @property
    def wait(self) -> list[float]:
        """Seconds in which each rank does nothing, [P]."""
        return [self.total - busy for busy in self.busy]

    @property
    def bubble(self) -> float:
        """The part of all ranks' time, 0 to 1, in which they do nothing."""
        return sum(self.wait) / (len(self.busy) * self.total) if self.total else 0.0


def simulate(
    orders: Sequence[Sequence[PipelineOp]],
    costs: Costs,
    loss: float = 0.0,
    taken: Mapping[tuple[int, PipelineOp], float] | None = None,
) -> Timeline:
    """Run the `orders` of all ranks, [P].

    `loss` is the seconds of the loss on the last rank. `taken` has the seconds of each rank's ops
    one by one, in place of the costs: what a step whose ops took so long could come to at best.

    Raises:
        InputError: costs for another number of virtual stages than the orders have.
        ValueError: the ranks wait for one another in a circle, or for an op that none of them has.
    """
    ranks = len(orders)
    placed = in_order(orders)
    costs.check_stages(1 + max(each.stage for each in placed))
    arrivals: list[float] = []
    spans: list[list[Span]] = [[] for _ in orders]
    clocks = [0.0] * ranks
    for rank, op, stage, sender, _ in placed:
        start = clocks[rank] if sender is None else max(clocks[rank], arrivals[sender])
        if taken is not None:
            end = start + taken[rank, op]
        else:
            end = start + (loss if op.kind is OpKind.LOSS else costs.seconds(op, stage))
        spans[rank].append(Span(rank, op, start, end))
        clocks[rank] = end
        arrivals.append(end + costs.message_seconds(op))
    return Timeline(
        spans=[span for done in spans for span in done],
        total=max(clocks),
        busy=[sum(span.end - span.start for span in done) for done in spans],
        messages=sum(each.sends for each in placed),
    )


class PlacedOp(NamedTuple):
    """An op of a rank, on virtual stage `stage`; sender: the place in the list of
    the op whose message it receives, None: it receives none; sends: whether it sends one."""

    rank: int
    op: PipelineOp
    stage: int
    sender: int | None
    sends: bool


def in_order(orders: Sequence[Sequence[PipelineOp]]) -> list[PlacedOp]:
    """The ops of all ranks, [P], each after those that it waits for.

    Raises:
        ValueError: the ranks wait for one another in a circle, or for an op that none of them has.
    """
    ranks = len(orders)
    last = ranks * (1 + max(op.chunk for order in orders for op in order)) - 1
    placed: list[PlacedOp] = []
    senders: dict[_Message, int] = {}
    waiting: dict[_Message, int] = {}  # which rank for it
    ready, left = list(range(ranks)), [iter(order) for order in orders]
    stopped_at: list[PipelineOp | None] = [next(ops, None) for ops in left]
    while ready:
        rank = ready.pop()
        op = stopped_at[rank]
        while op is not None:
            stage = op.chunk * ranks + rank
            received, sent = _messages(op, stage, last)
            if received and received not in senders:
                waiting[received] = rank
                break
            if sent:
                senders[sent] = len(placed)
                if sent in waiting:
                    ready.append(waiting.pop(sent))
            sender = senders[received] if received else None
            placed.append(PlacedOp(rank, op, stage, sender, sent is not None))
            op = next(left[rank], None)
        stopped_at[rank] = op
    if any(op is not None for op in stopped_at):
        raise ValueError("no rank can go on: each waits for an input that nobody will send")
    return placed


def ideal_step_seconds(
    ranks: int, microbatches: int, forward: float, backward: float, stash: int = 0, chunks: int = 1
) -> float:
    """A step over equal stages with instant messages: m (f + b) + (m - K) f + (P - 1)(f + b) / V.

    f and b are a rank's seconds for one microbatch in all its V chunks; the loss comes on top. One
    pass of 1F1B takes (m + (P - 1) / V)(f + b) (Narayanan et al., arXiv 2104.04473, section 2.2),
    and (m - K) f are the forwards of pass 1 that pass 2 repeats. The last rank begins pass 1 when
    P - 1 forwards of one chunk are done. As it ends, the other ranks have already brought the
    first microbatch of pass 2 to it, so the two passes have one fill and one drain between them.

    With V = 1 this holds for every K, and for fewer microbatches than ranks as well. With V > 1 it
    holds where the m - K microbatches without a graph are whole groups of `microbatch_group_size`
    (so for K = 0 and K = m). Where replays and forwards share a group, a rank may wait for forwards
    while it could replay: the step then takes up to (V - 1)(P - 1) f / V longer.
    """
    first_pass_again = (microbatches - stash) * forward
    return first_pass_again + (microbatches + (ranks - 1) / chunks) * (forward + backward)


# Content, receiving stage, microbatch. A plain tuple: a search for layouts makes millions.
_Message = tuple[str, int, int]


def _messages(op: PipelineOp, stage: int, last: int) -> tuple[_Message | None, _Message | None]:
    """The message that an op on virtual stage `stage` receives, and the one that it sends."""
    kind, microbatch = op.kind, op.microbatch
    if kind is OpKind.LOSS:
        return None, None
    before, after = stage - 1, stage + 1
    if kind is OpKind.BACKWARD:
        before, after, content = after, before, "gradients"
    elif kind is OpKind.FORWARD_AGAIN or kind is OpKind.REPLAY:
        content = "activations of pass 2"
    else:
        content = "activations of pass 1"
    received = (content, stage, microbatch) if 0 <= before <= last else None
    sent = (content, after, microbatch) if 0 <= after <= last else None
    return received, sent
