"""What ranks of a layout hold, by the planner's own count.

`FastMemory` runs one and two layers of each kind under fake tensors and extends them by their
difference; memory_checks.py holds it against whole stages and real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parallel_clip.config import Config, config_from_dict
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.stages.stage import Stage

GIB = 2**30


class Counts:
    """Of one model, at `pairs` in a microbatch, in bf16."""

    def __init__(self, architecture: Architecture, pairs: int):
        self.architecture, self.pairs = architecture, pairs
        self.memory = FastMemory(config_for(Layout(1), "none", pairs), architecture)

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        return self.plan(layout, "none").stages

    def plan(self, layout: Layout, recompute: str, batch: int | None = None) -> LayoutPlan:
        """batch: pairs of the global batch; None: a microbatch on each data rank."""
        config = config_for(layout, recompute, self.pairs, batch=batch)
        return make_layout_plan(self.architecture.costs, layout.world, config)

    def held(
        self, layout: Layout, recompute: str, number: int = 0, zero: bool = False
    ) -> RankMemory:
        """What the first rank of a stage holds. zero: the optimizer's state is split over the data
        ranks."""
        config = config_for(layout, recompute, self.pairs, zero)
        return self.memory.stages(config, self.plan(layout, recompute))[number]


def config_for(
    layout: Layout, recompute: str, pairs: int, zero: bool = False, batch: int | None = None
) -> Config:
    return config_from_dict(
        {
            "batch": {"global": batch or pairs * layout.data, "micro": pairs},
            "precision": "bf16",
            "recompute": recompute,
            "parallel": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "sequence": layout.sequence,
                "distributed_optimizer": zero,
            },
            "train": {"steps": 1},
            "data": {"train": [{"shards": "none.tar"}]},
        }
    )


# The kinds of bytes that trainers are compared by, in the order in which they are shown.
KINDS = (
    "weights", "copies", "gradients", "optimizer", "buffers", "activations", "loss", "inputs",
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Bytes of a GPU by kind, each at its fullest.

    copies: bf16 weights beside fp32 ones, while they are needed; buffers: of communication;
    activations: saved for backward; loss: at its fullest moment; at_once: an estimate of what is
    held together, no more than the sum.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    loss: int
    inputs: int
    at_once: int

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def as_dict(self) -> dict[str, Any]:
        kinds = {kind: getattr(self, kind) for kind in KINDS}
        return kinds | {"total": self.total, "at_once": self.at_once}
