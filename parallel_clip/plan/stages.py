"""What each stage of a pipeline holds and how long it works: the trainer's own code, run dry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel_clip.model.architectures import Architecture
from parallel_clip.pipeline.costs import stage_cost
from parallel_clip.pipeline.orders import peak_graphs, step_orders
from parallel_clip.pipeline.partition import Stage, chunks_of
from parallel_clip.pipeline.timeline import Costs, Timeline, simulate
from parallel_clip.plan.dry_run import RankBytes, dry_run
from parallel_clip.training.job import Job


@dataclass(frozen=True)
class StageLoad:
    """One pipeline rank: its stages, what it holds for one microbatch, and the bytes of activations
    that it holds at its fullest in a step; `flops`: forward, for one pair."""

    chunks: list[Stage]
    held: RankBytes
    peak_activations: int
    flops: int

    @property
    def peak(self) -> int:
        return self.held.state + self.peak_activations


def stage_loads(job: Job) -> list[StageLoad]:
    """Each pipeline rank's load. Takes seconds a stage, and a process that is alone so far."""
    return [_stage_load(job, rank) for rank in range(job.layout.pipeline)]


def held_by(job: Job, pipeline_rank: int) -> RankBytes:
    """What the first rank of a stage holds."""
    layout = job.layout
    rank = pipeline_rank * layout.data * layout.tensor
    return dry_run(job.config, job.architecture, layout, rank)


def peak_activations(job: Job, pipeline_rank: int, stash: int, held: RankBytes) -> int:
    """Bytes of saved activations that a rank holds at the fullest moment of a step."""
    layout = job.layout
    orders = step_orders(layout.pipeline, job.plan.microbatches, stash, layout.virtual_pipeline)
    return peak_graphs(orders[pipeline_rank], held.saved_by_chunk)


def step_timeline(job: Job) -> Timeline:
    """A step by its arithmetic: work of each stage in FLOPs, messages and the loss for nothing."""
    layout = job.layout
    forward = [job.plan.micro_batch * stage_cost(stage, job.architecture) for stage in job.stages]
    orders = step_orders(layout.pipeline, job.plan.microbatches, job.stash, layout.virtual_pipeline)
    return simulate(orders, [Costs(forward, [2 * cost for cost in forward])])


def _stage_load(job: Job, pipeline_rank: int) -> StageLoad:
    held = held_by(job, pipeline_rank)
    chunks = chunks_of(job.stages, job.layout.pipeline, pipeline_rank)
    return StageLoad(
        chunks,
        held,
        peak_activations(job, pipeline_rank, job.stash, held),
        _flops(chunks, job.architecture),
    )


def _flops(chunks: Sequence[Stage], architecture: Architecture) -> int:
    return sum(stage_cost(stage, architecture) for stage in chunks)
