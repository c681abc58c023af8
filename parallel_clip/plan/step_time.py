"""The time of a step by arithmetic: FLOPs of each stage through the pipeline's schedule."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_clip.model.architecture import Architecture
from parallel_clip.pipeline.orders import step_orders
from parallel_clip.pipeline.timeline import Costs, Timeline, simulate
from parallel_clip.plan.run_plan import Job
from parallel_clip.stages.costs import stage_cost
from parallel_clip.stages.stage import Stage


def step_timeline(job: Job) -> Timeline:
    """A step by its arithmetic: work of each stage in FLOPs, messages and the loss for nothing."""
    layout = job.layout
    forward = [job.plan.micro_batch * stage_cost(stage, job.architecture) for stage in job.stages]
    orders = step_orders(layout.pipeline, job.plan.microbatches, job.stash, layout.virtual_pipeline)
    return simulate(orders, Costs(forward, [2 * cost for cost in forward]))


def _flops(chunks: Sequence[Stage], architecture: Architecture) -> int:
    return sum(stage_cost(stage, architecture) for stage in chunks)
