"""All that a rank of a layout fills in a step, by kind, and the largest stash that fits.

What the model holds is `RankMemory`. Beside it stand estimates of what no count sees: what kernels
work in, the process itself, and what the allocator cannot use. docs/planning.md says which of them
have been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel_clip.config import Config
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.groups import has_joined
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory, count_stages, peak_memory
from parallel_clip.plan.rank_process import RankProcess
from parallel_clip.stages.partition import chunks_of

# Of what comes and goes in a step; state is allocated once and leaves no gaps.
SLACK = 0.05


@dataclass(frozen=True)
class RankBytes:
    """Bytes at the fullest moment. optimizer: with averages of the weights; inputs: pictures and
    texts; work: what kernels work in, and gradients on their way through a layer; buffers: messages
    between stages; process: as in `RankProcess`, buffers of communication included; workers:
    likewise; slack: of the allocator."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    inputs: int
    work: int
    buffers: int
    process: int
    workers: int
    slack: int

    @property
    def other(self) -> int:
        return self.inputs + self.work + self.buffers + self.process + self.workers + self.slack

    @property
    def total(self) -> int:
        counted = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return counted + self.other

    def seen_by_metrics(self, on_gpu: bool) -> int:
        """The part that `memory_bytes` of metrics.jsonl sees: on a GPU what torch has allocated
        there, else the rank's own process."""
        unseen = self.process + self.slack if on_gpu else self.workers
        return self.total - unseen


class Estimates(NamedTuple):
    """Bytes of a rank beside what is counted. work: of layers; token_table: of the gradient of the
    token embedding, where that is, until it is added to those of the microbatches before; features:
    of the batch, where the loss is computed; texts: of the rank's share; slack: in parts of what
    comes and goes."""

    work: int = 0
    token_table: int = 0
    buffers: int = 0
    features: int = 0
    texts: int = 0
    process: int = 0
    workers: int = 0
    slack: float = 0.0


class StepMemory:
    """Memory of one layout's steps, whatever their stash.

    held: of each pipeline stage, from `FastMemory` or `count_stages`.
    """

    def __init__(self, plan: LayoutPlan, held: Sequence[RankMemory], beside: Estimates):
        self._plan, self.held, self._beside = plan, tuple(held), beside

    def fullest(self, stash: int) -> tuple[int, RankBytes]:
        """The number of the stage that fills most, and what it does."""
        found = [self.of_stage(rank, stash) for rank in range(len(self.held))]
        rank = max(range(len(found)), key=lambda number: found[number].total)
        return rank, found[rank]

    def of_stage(self, rank: int, stash: int) -> RankBytes:
        """Of the rank of a stage that reads data, where one of them does."""
        plan, held, beside = self._plan, self.held[rank], self._beside
        peak = peak_memory(plan, rank, stash, held)
        loss = self._loss(rank, stash)
        features = beside.features if loss else 0
        work = beside.work if held.saved else 0
        chunks = chunks_of(plan.stages, plan.layout.pipeline, rank)
        if any(chunk.text.has_embedding for chunk in chunks):
            work += beside.token_table
        inputs = peak.pictures + beside.texts
        comes_and_goes = peak.activations + loss + inputs + work + features
        return RankBytes(
            weights=held.weights,
            gradients=held.gradients,
            optimizer=held.optimizer + held.averages,
            activations=peak.activations,
            loss=loss,
            inputs=inputs + features,
            work=work,
            buffers=beside.buffers,
            process=beside.process,
            workers=0 if rank else beside.workers,
            slack=int(beside.slack * comes_and_goes),
        )

    def _loss(self, rank: int, stash: int) -> int:
        """An upper bound, as `peak_loss_bytes` has it."""
        plan = self._plan
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        if not is_last and not replace(plan, stash=stash).loss_on_all_stages:
            return 0
        return plan.peak_loss_bytes(layout.tensor * (1 if is_last else layout.pipeline))

    def largest_stash(self, limit: int) -> int | None:
        """The most microbatches that can keep their graphs where a rank may fill `limit` bytes;
        None where not even two-pass fits."""
        return self._plan.largest_stash(lambda stash: self.fullest(stash)[1].total, limit)


def estimate_beside(
    plan: LayoutPlan,
    architecture: Architecture,
    memory: FastMemory,
    recompute: str,
    process: RankProcess,
) -> Estimates:
    """What a rank of a layout fills beside what is counted."""
    layout, batch = plan.layout, plan.batch
    groups = sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.data))
    groups += layout.world > 1
    # One on its way in and one out, forward and backward.
    messages = 4 * memory.message_bytes(plan) if layout.pipeline > 1 else 0
    # Layers that run again keep all of one at a time. Gradients of the widest tensors pass through:
    # about a third of what an ordinary layer keeps.
    ordinary = memory.layer_bytes(layout, "none")
    again = ordinary - memory.layer_bytes(layout, recompute)
    return Estimates(
        work=batch.micro_batch * (again + ordinary // 3),
        token_table=memory.token_table_bytes(layout),
        buffers=messages,
        # As they came, and together.
        features=2 * 4 * batch.per_rank * (1 + batch.captions) * plan.embed_dim,
        texts=8 * batch.per_rank * batch.captions * architecture.text.context_length,
        process=process.base + groups * process.group,
        workers=process.workers(batch.micro_batch, architecture.vision.image_size),
        slack=SLACK,
    )


def count_step(
    config: Config,
    architecture: Architecture,
    plan: LayoutPlan,
    process: RankProcess,
    whole_stages: bool = False,
) -> StepMemory:
    """Memory of the steps of a planned run. Touches no GPU.

    whole_stages: count by `count_stages`, which takes seconds a stage; else by `FastMemory`, which
    gives the same in a fraction of one.
    """
    if has_cuda() or has_joined():
        return call_without_gpus(count_step, config, architecture, plan, process, whole_stages)
    memory = FastMemory(config, architecture)
    if whole_stages:
        held = count_stages(config, architecture, plan)
    else:
        held = memory.stages(config, plan)
    beside = estimate_beside(plan, architecture, memory, config.recompute, process)
    return StepMemory(plan, held, beside)
