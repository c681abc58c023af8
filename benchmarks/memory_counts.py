"""What ranks of a layout hold, counted by the trainer's own code and each thing once.

State (weights, gradients, optimizer) does not depend on recompute nor on sequence parallelism, and
stages in the middle of a pipeline are alike; what has been counted is not counted again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from parallel_clip.config import Config, config_from_dict
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.model.handover import MessageLayout
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import RankMemory, dry_run, saved_activations
from parallel_clip.stages.partition import partition
from parallel_clip.stages.stage import LayerRange, Stage


class Counts:
    """Of one model, at `pairs` in a microbatch, bf16 and without ZeRO."""

    def __init__(self, architecture: Architecture, pairs: int):
        self.architecture, self.pairs = architecture, pairs
        self._states: dict[Any, RankMemory] = {}
        self._activations: dict[Any, tuple[dict[str, int], ...]] = {}

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        return partition(self.architecture.costs.on_tensor_ranks(layout.tensor), layout.pipeline)

    def held(self, layout: Layout, recompute: str, number: int = 0) -> RankMemory:
        """What the first tensor rank of a stage holds; one data rank, no virtual stages."""
        stages = self.stages(layout)
        rank = number * layout.tensor
        config = config_for(layout, recompute, self.pairs)
        state_key = (layout.tensor, _alike(stages[number]))
        activations_key = (
            *state_key,
            layout.sequence,
            recompute,
            self._message(stages, number, layout),
        )
        if state_key not in self._states:
            plan = make_layout_plan(self.architecture.costs, layout.world, config)
            found = dry_run(config, self.architecture, plan, rank)
            self._states[state_key] = found
            self._activations[activations_key] = found.activations
        if activations_key not in self._activations:
            self._activations[activations_key] = self._count_activations(
                config, layout, stages, number
            )
        return dataclasses.replace(
            self._states[state_key], activations=self._activations[activations_key]
        )

    def _count_activations(
        self, config: Config, layout: Layout, stages: tuple[Stage, ...], number: int
    ) -> tuple[dict[str, int], ...]:
        options = ModelOptions(config.precision, config.recompute, layout.sequence)
        with fake_rank(layout, number * layout.tensor) as groups:
            model = CLIPModel(self.architecture, options, groups.tensor, stages, number)
            return (saved_activations(model, self.pairs, groups.device),)

    def _message(self, stages: tuple[Stage, ...], number: int, layout: Layout) -> Any:
        """What a stage receives, and how long every message is: a graph keeps all of it."""
        sequence_ranks = layout.tensor if layout.sequence else 1
        messages = MessageLayout(self.architecture, stages, sequence_ranks)
        received = number and messages.of(stages[number - 1], self.pairs, training=True)
        return received, messages.length(self.pairs, training=True)


def _alike(stage: Stage) -> Any:
    """Equal for stages that hold the same, wherever in the middle they are."""

    def part(r: LayerRange) -> tuple:
        return r.layers, r.has_embedding, r.has_head, r.has_started, r.is_finished

    return stage.is_first, stage.is_last, part(stage.vision), part(stage.text)


def config_for(layout: Layout, recompute: str, pairs: int, zero: bool = False) -> Config:
    return config_from_dict(
        {
            "batch": {"global": pairs * layout.data, "micro": pairs},
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
