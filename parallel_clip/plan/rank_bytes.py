"""All that a GPU of a layout fills in a step, by kind, and the largest stash that fits.

Tensors are counted as a whole step of the trainer's own code holds them (`step_peak.py`). Beside
them stand estimates of what no count sees: what libraries allocate for themselves, and what the
allocator cannot use. These are not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel_clip.pipeline.orders import (
    forward_sequence,
    peak_graphs_of_step,
    warmup_forwards,
)
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory, peak_memory

# Of the CUDA context, cuBLAS's and cuDNN's workspaces.
CONTEXT_BYTES = 800 << 20
# Of NCCL, for each process group of several ranks: with its default of 4 MiB a channel and
# connection (NCCL_BUFFSIZE) 16 channels to two neighbours take 128 MiB.
GROUP_BYTES = 128 << 20
# Of what comes and goes in a step; state is allocated once and leaves no gaps.
SLACK = 0.05


@dataclass(frozen=True)
class RankBytes:
    """Bytes at the fullest moment. optimizer: with averages of the weights; inputs: pictures and
    texts; loss: in the second pass, features and their gradients; work: gradients on their way,
    what is computed again, and what sequence parallelism gathers into; buffers: of the GPU's
    libraries and of NCCL; slack: of the allocator."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    inputs: int
    work: int
    buffers: int
    slack: int

    @property
    def other(self) -> int:
        return self.inputs + self.work + self.buffers + self.slack

    @property
    def tensors(self) -> int:
        """What is not estimated."""
        return self.total - self.buffers - self.slack

    @property
    def total(self) -> int:
        counted = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return counted + self.other


class StepMemory:
    """Memory of one layout's steps, whatever their stash.

    held: of each pipeline stage, from `memory` or `count_stages`.
    """

    def __init__(
        self,
        plan: LayoutPlan,
        held: Sequence[RankMemory],
        memory: FastMemory,
        recompute: str,
    ):
        self._plan, self._held, self._memory, self._recompute = plan, held, memory, recompute
        layout = plan.layout
        groups = sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.data))
        groups += layout.world > 1
        self._buffers = CONTEXT_BYTES + groups * GROUP_BYTES

    def fullest(self, stash: int) -> tuple[int, RankBytes]:
        """The number of the stage that fills most, and what it does."""
        found = [self.of_stage(rank, stash) for rank in range(len(self._held))]
        rank = max(range(len(found)), key=lambda number: found[number].total)
        return rank, found[rank]

    def of_stage(self, rank: int, stash: int) -> RankBytes:
        """At the fuller of two moments: in the loss, with the graphs of the stash alone; in the
        second pass, with the loss's gradients alone."""
        at_loss, in_backward = self._at_loss(rank, stash), self._in_backward(rank, stash)
        return max(in_backward, at_loss, key=lambda moment: moment.total)

    def _at_loss(self, rank: int, stash: int) -> RankBytes:
        plan, held = self._plan, self._held[rank]
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        loss = 0
        if is_last or replace(plan, stash=stash).loss_on_all_stages:
            loss = plan.peak_loss_bytes(layout.tensor * (1 if is_last else layout.pipeline))
            loss += (1 + is_last) * self._memory.feature_bytes(plan)  # as they came, and together
        pictures = held.pictures * stash * held.keeps_pictures
        return self._bytes(rank, held.saved * stash, loss, pictures, 0)

    def _in_backward(self, rank: int, stash: int) -> RankBytes:
        plan, held, memory = self._plan, self._held[rank], self._memory
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        peak = peak_memory(plan, rank, stash, held)
        features = 2 * memory.feature_bytes(plan) * is_last  # and their gradients
        work = self._messages(rank, stash) * memory.message_bytes(plan)
        if held.saved:
            # At the end of forward: what the last layers give, its copy that is handed on, and the
            # message that came, of which backward lets one part go after the other.
            forward = (1 + (not is_last) + (rank > 0)) * memory.hidden_bytes(plan)
            backward = memory.transient_bytes(plan, rank, self._recompute)
            extras = [max(forward, of_chunk) for of_chunk in backward]
            place = rank, layout.pipeline, plan.batch.microbatches, stash
            with_work = peak_graphs_of_step(*place, held.saved_by_chunk, extras)
            work += with_work - peak.activations
        return self._bytes(rank, peak.activations, features, peak.pictures, work)

    def _messages(self, rank: int, stash: int) -> int:
        """Those that megatron-core's schedule holds at once, beside what graphs keep: gradients of
        what was handed on, and of what came with the microbatch before; and what comes again with
        microbatches that are replayed."""
        layout, count = self._plan.layout, self._plan.batch.microbatches
        chunks, ranks = layout.virtual_pipeline, layout.pipeline
        started = min(warmup_forwards(rank, ranks, count, chunks) + 1, count * chunks)
        forwards = forward_sequence(ranks, count, chunks)[(count - stash) * chunks : started]
        replayed = sum(rank > 0 or chunk > 0 for _, chunk in forwards)
        if chunks > 1:
            return 2 + max(1, replayed)
        return (rank < ranks - 1) + (rank > 0) + replayed

    def _bytes(self, rank: int, activations: int, loss: int, pictures: int, work: int) -> RankBytes:
        plan, held = self._plan, self._held[rank]
        work += self._memory.gathered_bytes(plan)
        inputs = pictures + self._memory.token_bytes(plan)
        return RankBytes(
            held.weights,
            held.gradients,
            held.optimizer + held.averages,
            activations,
            loss,
            inputs,
            work,
            self._buffers,
            int(SLACK * (activations + loss + inputs + work)),
        )

    def largest_stash(self, limit: int) -> int | None:
        """The most microbatches that can keep their graphs where a GPU has `limit` bytes; None
        where not even two-pass fits."""
        return self._plan.largest_stash(lambda stash: self.fullest(stash)[1].total, limit)
