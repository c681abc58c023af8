"""What each stage of a planned run holds, how much it works, and how long a step takes by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel_clip.pipeline.timeline import Costs, Timeline, simulate
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory, peak_memory
from parallel_clip.stages.costs import (
    ModelCosts,
    backward_cost,
    second_forward_cost,
    stage_cost,
)
from parallel_clip.stages.partition import chunks_of
from parallel_clip.stages.stage import Stage


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline rank: its stages, what it holds for one microbatch, and the bytes of activations
    and pictures that it holds at its fullest in a step; `flops`: forward, for one pair, of all its
    tensor ranks together, padding included; `work`: forward and backward."""

    chunks: list[Stage]
    held: RankMemory
    peak_activations: int
    peak_pictures: int
    flops: int
    work: int

    @property
    def peak(self) -> int:
        return self.held.state + self.peak_activations + self.peak_pictures


@dataclass(frozen=True)
class StepEstimate:
    """A step: its pipeline ranks, and the part, 0 to 1, of their time in which they wait."""

    stages: list[StageEstimate]
    bubble: float


def estimate_step(
    plan: LayoutPlan, costs: ModelCosts, memory: Sequence[RankMemory]
) -> StepEstimate:
    """Estimate a step. memory: what each pipeline rank holds, from `count_stages`."""
    found, on_ranks = [], plan.costs_on_ranks(costs)
    for rank, held in enumerate(memory):
        chunks = chunks_of(plan.stages, plan.layout.pipeline, rank)
        peaks = peak_memory(plan, rank, plan.stash, held)
        flops = sum(stage_cost(stage, on_ranks) for stage in chunks)
        work = flops + sum(backward_cost(stage, on_ranks) for stage in chunks)
        found.append(StageEstimate(chunks, held, *peaks, flops, work))
    return StepEstimate(found, step_timeline(plan, costs).bubble)


def step_timeline(plan: LayoutPlan, costs: ModelCosts) -> Timeline:
    """A step in FLOPs: the work of each stage; messages and the loss take no time."""
    on_ranks, pairs = plan.costs_on_ranks(costs), plan.batch.micro_batch
    forward, backward, again = (
        [pairs * cost(stage, on_ranks) for stage in plan.stages]
        for cost in (stage_cost, backward_cost, second_forward_cost)
    )
    return simulate(plan.orders(plan.stash), Costs(forward, backward, forward_again=again))
