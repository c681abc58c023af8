"""What each stage of a pipeline holds and how long it works: the trainer's own code, run dry."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_clip.plan.memory import RankMemory, peak_activations, stage_memory
from parallel_clip.plan.run_plan import Job
from parallel_clip.plan.step_time import _flops
from parallel_clip.stages.partition import chunks_of
from parallel_clip.stages.stage import Stage


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline rank: its stages, what it holds for one microbatch, and the bytes of activations
    that it holds at its fullest in a step; `flops`: forward, for one pair."""

    chunks: list[Stage]
    held: RankMemory
    peak_activations: int
    flops: int

    @property
    def peak(self) -> int:
        return self.held.state + self.peak_activations


def stage_estimates(job: Job) -> list[StageEstimate]:
    """Each pipeline rank's load. Takes seconds a stage, and a process that is alone so far."""
    return [_stage_estimate(job, rank) for rank in range(job.layout.pipeline)]


def _stage_estimate(job: Job, pipeline_rank: int) -> StageEstimate:
    held = stage_memory(job, pipeline_rank)
    chunks = chunks_of(job.stages, job.layout.pipeline, pipeline_rank)
    return StageEstimate(
        chunks,
        held,
        peak_activations(job, pipeline_rank, job.stash, held),
        _flops(chunks, job.architecture),
    )
