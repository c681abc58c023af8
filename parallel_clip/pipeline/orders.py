"""The ops of each pipeline rank in one step, in the order of megatron-core's schedules. No torch.

P pipeline ranks of V chunks each are P × V virtual stages; chunk c of rank r is stage c × P + r.
A contrastive step over m microbatches is two passes without a barrier between them:

- pass 1: every microbatch forward. The last K, the stash, keep their graphs; the others have none.
- the loss over all embeddings, on the last rank.
- pass 2: 1F1B, interleaved where V > 1, over every microbatch. Those without a graph go forward
  again; a stashed one is replayed: its place in the schedule is kept, its forward costs nothing.

K = 0 is two-pass, K = m is stash. The last microbatches are stashed and not the first: the first
would be replayed at a quicker pace than the pipeline can keep up when forwards follow, and the last
rank would wait for up to P - 1 of these.

Interleaving is that of Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM", arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from itertools import chain
from operator import ge
from typing import NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.layout import check_virtual_pipeline


class OpKind(Enum):
    """Kinds of ops. The first two belong to pass 1, those after the loss to pass 2."""

    FORWARD_WITHOUT_GRAPH = "forward without graph"
    FORWARD_KEEPING_GRAPH = "forward keeping graph"
    LOSS = "loss"
    FORWARD_AGAIN = "forward again"
    REPLAY = "replay"
    BACKWARD = "backward"


class PipelineOp(NamedTuple):
    """One op of a rank: of a microbatch in one of the rank's chunks (both 0 for the loss)."""

    kind: OpKind
    microbatch: int = 0
    chunk: int = 0


def step_orders(
    ranks: int, microbatches: int, stash: int = 0, chunks: int = 1
) -> list[list[PipelineOp]]:
    """The ops of a step, for each rank.

    Raises:
        InputError: the stash is larger than the step; chunks on one rank, or over more ranks than
            there are microbatches.
    """
    if ranks < 1 or microbatches < 1 or chunks < 1:
        raise InputError(
            f"{ranks} pipeline ranks, {microbatches} microbatches, {chunks} virtual stages a rank: "
            "each must be at least 1"
        )
    if not 0 <= stash <= microbatches:
        raise InputError(f"a stash of {stash} microbatches: a step has {microbatches}")
    check_virtual_pipeline(ranks, chunks)
    kept = range(microbatches - stash, microbatches)
    sequence = forward_sequence(ranks, microbatches, chunks)
    without, keeping = OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_KEEPING_GRAPH
    first = [PipelineOp(keeping if m in kept else without, m, chunk) for m, chunk in sequence]
    again, replay = OpKind.FORWARD_AGAIN, OpKind.REPLAY
    forwards = [PipelineOp(replay if m in kept else again, m, chunk) for m, chunk in sequence]
    backwards = [PipelineOp(OpKind.BACKWARD, m, chunks - 1 - chunk) for m, chunk in sequence]
    orders = []
    for rank in range(ranks):
        loss = [PipelineOp(OpKind.LOSS)] * (rank == ranks - 1)
        warmup = warmup_forwards(rank, ranks, microbatches, chunks)
        steady = len(forwards) - warmup
        by_turns = chain.from_iterable(zip(forwards[warmup:], backwards[:steady], strict=True))
        orders.append([*first, *loss, *forwards[:warmup], *by_turns, *backwards[steady:]])
    return orders


def warmup_forwards(rank: int, ranks: int, microbatches: int, chunks: int = 1) -> int:
    """How many forwards a rank runs in a pass of 1F1B before the first that a backward follows."""
    if chunks == 1:
        return min(ranks - 1 - rank, microbatches)
    group = microbatch_group_size(microbatches, ranks)
    return min(2 * (ranks - 1 - rank) + (chunks - 1) * group, microbatches * chunks)


def microbatch_group_size(microbatches: int, ranks: int) -> int:
    """How many microbatches go through one virtual stage of a rank before the next one's turn: the
    fewest, and so the least memory, that megatron-core takes.

    A group is at least as large as the pipeline, since its first microbatch must be back at the
    first rank when that one has sent the group's last; this holds for the remainder too.

    Raises:
        InputError: fewer microbatches than ranks.
    """
    for group in range(ranks, microbatches + 1):
        if microbatches % group == 0 or microbatches % group >= ranks:
            return group
    raise InputError(
        f"parallel.virtual_pipeline above 1 needs at least parallel.pipeline {ranks} microbatches, "
        f"and a step has {microbatches}; set parallel.virtual_pipeline to 1, or lower batch.micro"
    )


def peak_graphs(
    order: Iterable[PipelineOp],
    sizes: Sequence[int] | None = None,
    extras: Sequence[int] | None = None,
) -> int:
    """The most graphs alive at once on a rank, each of one microbatch in one chunk.

    With one chunk: K + min(P - rank, m - K). With the `sizes` of a graph in each chunk, such as
    bytes of saved activations, the largest sum of the sizes of graphs alive at once. extras: what
    there is beside them while a microbatch goes backward in each chunk.
    """
    alive = peak = 0
    for op in order:
        size = 1 if sizes is None else sizes[op.chunk]
        if op.kind in (OpKind.FORWARD_KEEPING_GRAPH, OpKind.FORWARD_AGAIN):
            alive += size
            peak = max(peak, alive)
        elif op.kind is OpKind.BACKWARD:
            peak = max(peak, alive + (extras[op.chunk] if extras else 0))
            alive -= size
    return peak


def peak_graphs_of_step(
    rank: int,
    ranks: int,
    microbatches: int,
    stash: int,
    sizes: Sequence[int],
    extras: Sequence[int] | None = None,
) -> int:
    """`peak_graphs` of what `rank` runs in a step, without its order where that is long. sizes: of
    a graph in each of its chunks; extras: as there.

    The stash is held from pass 1 on; beside it pass 2 holds as many graphs as a step of the others
    alone: with one chunk min(P - rank, m - K). With several, two groups of the pipeline's size fill
    it, and more pass through it one by one; that is so where m and K are whole groups (tested, not
    proved), and else the order is gone through.
    """
    others = microbatches - stash
    extras = extras or [0] * len(sizes)
    if len(sizes) == 1:
        return sizes[0] * (stash + min(ranks - rank, others)) + extras[0]
    if microbatches % ranks or stash % ranks:
        order = step_orders(ranks, microbatches, stash, len(sizes))[rank]
        return peak_graphs(order, sizes, extras)
    if others:
        graphs = [
            sum(n * size for n, size in zip(alive, sizes, strict=True)) + extras[chunk]
            for chunk, alive in _fullest_moments(rank, ranks, min(others, 2 * ranks), len(sizes))
        ]
    else:  # a group goes backward through the last chunk, then through the one before
        graphs = [extras[chunk] - ranks * sum(sizes[chunk + 1 :]) for chunk in range(len(sizes))]
    return stash * sum(sizes) + max(graphs)


@cache
def _fullest_moments(
    rank: int, ranks: int, microbatches: int, chunks: int
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Whenever a graph ends in a step without a stash: of which chunk, and how many of each are
    alive. A search over layouts asks for the same few again and again."""
    alive, moments = [0] * chunks, set()
    for op in step_orders(ranks, microbatches, 0, chunks)[rank]:
        if op.kind is OpKind.FORWARD_AGAIN:
            alive[op.chunk] += 1
        elif op.kind is OpKind.BACKWARD:
            moments.add((op.chunk, tuple(alive)))
            alive[op.chunk] -= 1

    def is_below(moment: tuple, other: tuple) -> bool:
        return other != moment and other[0] == moment[0] and all(map(ge, other[1], moment[1]))

    return tuple(m for m in moments if not any(is_below(m, other) for other in moments))


def forward_sequence(ranks: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """(microbatch, chunk) in the order of the forwards: a group through each chunk in turn."""
    group = microbatch_group_size(microbatches, ranks) if chunks > 1 else microbatches
    return [
        (microbatch, chunk)
        for start in range(0, microbatches, group)
        for chunk in range(chunks)
        for microbatch in range(start, min(start + group, microbatches))
    ]
