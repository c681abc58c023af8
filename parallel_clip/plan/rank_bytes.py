"""All that a rank of a layout fills in a step, by kind, and the largest stash that fits.

Tensors are counted as a whole step of the trainer's own code holds them (step_peak.py). Beside them
stand estimates of what no count sees: the process itself, and what the allocator cannot use.
docs/planning.md says which of them have been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel_clip.config import Config
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.groups import has_joined
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.model.architecture import Architecture
from parallel_clip.pipeline.orders import (
    microbatch_group_size,
    peak_graphs_of_step,
    warmup_forwards,
)
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory, count_stages, peak_memory
from parallel_clip.plan.rank_process import RankProcess


@dataclass(frozen=True)
class RankBytes:
    """Bytes at the fullest moment. optimizer: with averages of the weights; inputs: pictures and
    texts; loss: in the second pass, features and their gradients; work: gradients on their way, and
    what is computed again; buffers: messages between stages, and what sequence parallelism gathers
    into; process, workers: as in `RankProcess`; slack: of the allocator."""

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
        return self.total - (
            self.weights + self.gradients + self.optimizer + self.activations + self.loss
        )

    @property
    def tensors(self) -> int:
        """What is counted, not estimated."""
        return self.total - self.process - self.workers - self.slack

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def seen_by_metrics(self, on_gpu: bool) -> int:
        """The part that `memory_bytes` of metrics.jsonl sees: on a GPU what torch has allocated
        there, else the rank's own process."""
        return self.tensors if on_gpu else self.total - self.workers


class StepMemory:
    """Memory of one layout's steps, whatever their stash. Numbers alone: all that runs code of the
    model has run when it is made, so that a process without GPUs can make it for another.

    held: of each pipeline stage, from `memory` or `count_stages`.
    """

    def __init__(
        self,
        plan: LayoutPlan,
        held: Sequence[RankMemory],
        memory: FastMemory,
        recompute: str,
        process: RankProcess,
    ):
        self._plan, self.held = plan, tuple(held)
        self._message, self._gathered = memory.message_bytes(plan), memory.gathered_bytes(plan)
        self._features, self._tokens = memory.feature_bytes(plan), memory.token_bytes(plan)
        self._work = [self._of_passing(rank, memory, recompute) for rank in range(len(self.held))]
        layout, image_size = plan.layout, memory.architecture.vision.image_size
        groups = sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.data))
        groups += layout.world > 1
        self._process, self._slack = process.base + groups * process.group, process.slack
        self._workers = process.workers(plan.batch.micro_batch, image_size)

    def fullest(self, stash: int) -> tuple[int, RankBytes]:
        """The number of the stage that fills most, and what it does."""
        found = [self.of_stage(rank, stash) for rank in range(len(self.held))]
        rank = max(range(len(found)), key=lambda number: found[number].total)
        return rank, found[rank]

    def of_stage(self, rank: int, stash: int) -> RankBytes:
        """Of the rank of a stage that reads data, where one of them does. At the fuller of two
        moments: in the loss, with the graphs of the stash alone; in the second pass, with the
        loss's gradients alone."""
        at_loss, in_backward = self._at_loss(rank, stash), self._in_backward(rank, stash)
        return max(in_backward, at_loss, key=lambda moment: moment.total)

    def _at_loss(self, rank: int, stash: int) -> RankBytes:
        plan, held = self._plan, self.held[rank]
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        loss = 0
        if is_last or replace(plan, stash=stash).loss_on_all_stages:
            loss = plan.peak_loss_bytes(layout.tensor * (1 if is_last else layout.pipeline))
            loss += (1 + is_last) * self._features  # as they came, and together
        pictures = held.pictures * stash * held.keeps_pictures
        return self._bytes(rank, held.saved * stash, loss, pictures)

    def _in_backward(self, rank: int, stash: int) -> RankBytes:
        plan, held = self._plan, self.held[rank]
        layout, is_last = plan.layout, rank == plan.layout.pipeline - 1
        peak, work = peak_memory(plan, rank, stash, held), 0
        features = 2 * self._features * is_last  # and their gradients
        if held.saved:
            place = rank, layout.pipeline, plan.batch.microbatches, stash
            with_work = peak_graphs_of_step(*place, held.saved_by_chunk, self._work[rank])
            work = with_work - peak.activations
        messages = self._messages(rank, stash) * self._message
        return self._bytes(rank, peak.activations, features, peak.pictures, work, messages)

    def _of_passing(self, rank: int, memory: FastMemory, recompute: str) -> list[int]:
        """The most that comes and goes while a microbatch passes through each stage of a rank."""
        plan, is_last = self._plan, rank == len(self.held) - 1
        # At the end of forward: what the last layers give, its copy that is handed on, and the
        # message that came, of which backward lets one part go after the other.
        forward = (1 + (not is_last) + (rank > 0)) * memory.hidden_bytes(plan)
        backward = memory.transient_bytes(plan, rank, recompute, self._message)
        return [max(forward, of_stage) for of_stage in backward]

    def _messages(self, rank: int, stash: int) -> int:
        """Those that megatron-core's schedule holds at once, beside what graphs keep: gradients of
        what was handed on, and of what came with the microbatch before; and what comes again with
        microbatches that are replayed."""
        layout, count = self._plan.layout, self._plan.batch.microbatches
        chunks, ranks = layout.virtual_pipeline, layout.pipeline
        # Forwards that no backward has followed when the last is under way, replays at their end.
        started = min(warmup_forwards(rank, ranks, count, chunks) + 1, count * chunks)
        replays = range((count - stash) * chunks, started)
        if chunks == 1:
            return (rank < ranks - 1) + (rank > 0) + len(replays) * (rank > 0)
        group = microbatch_group_size(count, ranks)
        come = sum(rank > 0 or number // group % chunks > 0 for number in replays)
        return 2 + max(1, come)

    def _bytes(
        self,
        rank: int,
        activations: int,
        loss: int,
        pictures: int,
        work: int = 0,
        messages: int = 0,
    ) -> RankBytes:
        held, buffers, inputs = self.held[rank], messages + self._gathered, pictures + self._tokens
        comes_and_goes = activations + loss + inputs + work + buffers
        return RankBytes(
            weights=held.weights,
            gradients=held.gradients,
            optimizer=held.optimizer + held.averages,
            activations=activations,
            loss=loss,
            inputs=inputs,
            work=work,
            buffers=buffers,
            process=self._process,
            workers=0 if rank else self._workers,
            slack=int(self._slack * comes_and_goes),
        )

    def largest_stash(self, limit: int) -> int | None:
        """The most microbatches that can keep their graphs where a rank may fill `limit` bytes;
        None where not even two-pass fits."""
        return self._plan.largest_stash(lambda stash: self.fullest(stash)[1].total, limit)


def predict_step_memory(
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
        arguments = config, architecture, plan, process, whole_stages
        return call_without_gpus(predict_step_memory, *arguments)
    memory = FastMemory(config, architecture)
    if whole_stages:
        held = count_stages(config, architecture, plan)
    else:
        held = memory.stages(config, plan)
    return StepMemory(plan, held, memory, config.recompute, process)
