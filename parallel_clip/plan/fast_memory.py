"""Memory of a layout's stages as `count_stages` counts it, quick enough to rank all layouts."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from parallel_clip.config import Config
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.handover import MessageLayout
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.plan.fast_activations import StageActivations
from parallel_clip.plan.fast_state import StageStates
from parallel_clip.plan.fast_transients import StageTransients
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.stages.partition import chunks_of


class FastMemory:
    """Of one model, as one config trains it; of its `parallel`, `batch` and `recompute` any. Keeps
    what it has found. Raises RuntimeError in a process that has joined a process group."""

    def __init__(self, config: Config, architecture: Architecture):
        self.architecture = architecture
        self._dtype = DTYPES[config.precision]
        self._states = StageStates(config, architecture)
        self._activations = StageActivations(config, architecture)
        self._transients = StageTransients(config, architecture)

    def stages(self, config: Config, plan: LayoutPlan) -> tuple[RankMemory, ...]:
        """What the first rank of each pipeline stage holds, as `count_stages`."""
        layout, pairs, itemsize = plan.layout, plan.batch.micro_batch, self._dtype.itemsize
        message_bytes = self.message_bytes(plan)
        found = []
        for rank in range(layout.pipeline):
            chunks = chunks_of(plan.stages, layout.pipeline, rank)
            state = self._states.of(chunks, layout, rank, config.parallel.distributed_optimizer)
            saved = tuple(
                self._activations.of(chunk, layout, config.recompute, pairs, message_bytes)
                for chunk in chunks
            )
            pixels = prod(self.architecture.vision.image_size) if chunks[0].is_first else 0
            pixels *= 3 * pairs
            pictures = {"pictures": pixels * itemsize, "pictures_ahead": pixels}
            found.append(replace(state, activations=saved, **pictures))
        return tuple(found)

    def message_bytes(self, plan: LayoutPlan) -> int:
        """Of what a stage hands on of one microbatch."""
        sequence_ranks = plan.layout.tensor if plan.layout.sequence else 1
        captions = plan.batch.captions
        messages = MessageLayout(self.architecture, plan.stages, sequence_ranks, captions)
        return messages.length(plan.batch.micro_batch, training=True) * self._dtype.itemsize

    def transient_bytes(
        self, plan: LayoutPlan, rank: int, recompute: str, message: int
    ) -> list[int]:
        """What comes and goes in a microbatch's backward pass on each stage of a rank. message: its
        `message_bytes`."""
        layout, of_tower = plan.layout, (plan.layout, recompute, plan.batch.micro_batch)
        return [
            self._transients.of(chunk, *of_tower, self._activations.of(chunk, *of_tower, message))
            for chunk in chunks_of(plan.stages, layout.pipeline, rank)
        ]

    def hidden_bytes(self, plan: LayoutPlan) -> int:
        """Of a microbatch's hidden states in both towers, on one rank."""
        return sum(self._hidden_bytes(plan, plan.layout.tensor if plan.layout.sequence else 1))

    def gathered_bytes(self, plan: LayoutPlan) -> int:
        """Of megatron-core's buffer into which sequence parallelism gathers the tokens of a layer,
        and which stays: for the tower where they take more."""
        if not plan.layout.sequence or plan.layout.tensor == 1:
            return 0
        return plan.layout.tensor * max(self._hidden_bytes(plan, plan.layout.tensor))

    def _hidden_bytes(self, plan: LayoutPlan, sequence_ranks: int) -> list[int]:
        towers = (self.architecture.vision, 1), (self.architecture.text, plan.batch.captions)
        pair_bytes = plan.batch.micro_batch * self._dtype.itemsize
        return [
            -(-tower.training_tokens // sequence_ranks) * tower.width * count * pair_bytes
            for tower, count in towers
        ]

    def feature_bytes(self, plan: LayoutPlan) -> int:
        """Of a rank's share of the batch, fp32."""
        batch = plan.batch
        return 4 * batch.per_rank * (1 + batch.captions) * self.architecture.embed_dim

    def token_bytes(self, plan: LayoutPlan) -> int:
        """Of the texts of a rank's share of the batch, int64."""
        texts = plan.batch.per_rank * plan.batch.captions
        return 8 * texts * self.architecture.text.context_length
