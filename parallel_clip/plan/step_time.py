"""The time of a step by arithmetic: FLOPs of each stage through the pipeline's schedule."""

from __future__ import annotations

from parallel_clip.pipeline.orders import step_orders
from parallel_clip.pipeline.timeline import Costs, Timeline, simulate
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.stages.costs import ModelCosts, stage_cost


def step_timeline(plan: LayoutPlan, costs: ModelCosts) -> Timeline:
    """A step in FLOPs: work of each stage, a backward twice its forward; messages and the loss
    take no time."""
    layout, batch = plan.layout, plan.batch
    forward = [batch.micro_batch * stage_cost(stage, costs) for stage in plan.stages]
    orders = step_orders(layout.pipeline, batch.microbatches, plan.stash, layout.virtual_pipeline)
    return simulate(orders, Costs(forward, [2 * cost for cost in forward]))
