"""All that a GPU of a layout fills in a step, by kind, and the largest stash that fits.

What the model holds is `RankMemory`. Beside it stand estimates of what no count sees: what kernels
work in, buffers of communication, and what the allocator cannot use. These are not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel_clip.model.architecture import Architecture
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
    texts; work: what kernels work in, and gradients on their way through a layer; buffers: of
    communication and of the GPU's libraries; slack: of the allocator."""

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
    def total(self) -> int:
        counted = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return counted + self.other


class StepMemory:
    """Memory of one layout's steps, whatever their stash.

    held: of each pipeline stage, from `FastMemory` or `count_stages`.
    """

    def __init__(
        self,
        plan: LayoutPlan,
        held: Sequence[RankMemory],
        architecture: Architecture,
        memory: FastMemory,
        recompute: str,
    ):
        self._plan, self._held = plan, held
        layout, batch = plan.layout, plan.batch
        text = architecture.text
        groups = sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.data))
        groups += layout.world > 1
        message = memory.message_bytes(plan) if layout.pipeline > 1 else 0
        buffers = CONTEXT_BYTES + groups * GROUP_BYTES
        buffers += 4 * message  # one on its way in and one out, forward and backward
        # Layers that run again keep all of one at a time. Gradients of the widest tensors pass
        # through: about a third of what an ordinary layer keeps.
        ordinary = memory.layer_bytes(layout, "none")
        again = ordinary - memory.layer_bytes(layout, recompute)
        work = batch.micro_batch * (again + ordinary // 3)
        # Features of the batch: as they came, and together.
        features = 2 * 4 * batch.per_rank * (1 + batch.captions) * plan.embed_dim
        self._texts = 8 * batch.per_rank * batch.captions * text.context_length
        self._work, self._buffers, self._features = work, buffers, features

    def fullest(self, stash: int) -> tuple[int, RankBytes]:
        """The number of the stage that fills most, and what it does."""
        found = [self.of_stage(rank, stash) for rank in range(len(self._held))]
        rank = max(range(len(found)), key=lambda number: found[number].total)
        return rank, found[rank]

    def of_stage(self, rank: int, stash: int) -> RankBytes:
        plan, held = self._plan, self._held[rank]
        peak = peak_memory(plan, rank, stash, held)
        loss = self._loss(rank, stash)
        features = self._features if loss else 0
        work = self._work if held.saved else 0
        inputs = peak.pictures + self._texts
        comes_and_goes = peak.activations + loss + inputs + work + features
        return RankBytes(
            held.weights,
            held.gradients,
            held.optimizer + held.averages,
            peak.activations,
            loss,
            inputs + features,
            work,
            self._buffers,
            int(SLACK * comes_and_goes),
        )

    def _loss(self, rank: int, stash: int) -> int:
        """An upper bound, as `filled_bytes` has it on the last stage."""
        plan = self._plan
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        if not is_last and not replace(plan, stash=stash).loss_on_all_stages:
            return 0
        return plan.peak_loss_bytes(layout.tensor * (1 if is_last else layout.pipeline))

    def largest_stash(self, limit: int) -> int | None:
        """The most microbatches that can keep their graphs where a GPU has `limit` bytes; None
        where not even two-pass fits."""
        return self._plan.largest_stash(lambda stash: self.fullest(stash)[1].total, limit)
