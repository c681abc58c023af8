"""What each stage of a planned run holds, how much it works, and how long a step takes by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel_clip.pipeline.timeline import Costs, Timeline, simulate
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory, peak_activations, peak_pictures
from parallel_clip.stages.costs import ModelCosts, stage_cost
from parallel_clip.stages.partition import chunks_of
from parallel_clip.stages.stage import Stage


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline rank: its stages, what it holds for one microbatch, and the bytes of activations
    and pictures that it holds at its fullest in a step; `flops`: forward, for one pair."""

    chunks: list[Stage]
    held: RankMemory
    peak_activations: int
    peak_pictures: int
    flops: int

    @property
    def peak(self) -> int:
        return self.held.state + self.peak_activations + self.peak_pictures


def stage_estimates(
    plan: LayoutPlan, costs: ModelCosts, memory: Sequence[RankMemory]
) -> list[StageEstimate]:
    """The estimate of each pipeline rank. memory: what each holds, from `count_stages`."""
    found = []
    for rank, held in enumerate(memory):
        chunks = chunks_of(plan.stages, plan.layout.pipeline, rank)
        found.append(
            StageEstimate(
                chunks,
                held,
                peak_activations(plan, rank, plan.stash, held),
                peak_pictures(plan, plan.stash, held),
                sum(stage_cost(stage, costs) for stage in chunks),
            )
        )
    return found


def step_timeline(plan: LayoutPlan, costs: ModelCosts) -> Timeline:
    """A step in FLOPs: work of each stage, a backward twice its forward; messages and the loss
    take no time."""
    forward = [plan.batch.micro_batch * stage_cost(stage, costs) for stage in plan.stages]
    return simulate(plan.orders(plan.stash), Costs(forward, [2 * cost for cost in forward]))
