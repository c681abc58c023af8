"""Memory of a layout's stages as `count_stages` counts it, quick enough to rank all layouts."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from parallel_clip.config import Config
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.handover import MessageLayout
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import ROWS
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.fast_activations import StageActivations
from parallel_clip.plan.fast_state import StageStates
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.stages.partition import chunks_of


class FastMemory:
    """Of one model, as one config trains it; of its `parallel`, `batch` and `recompute` any. Keeps
    what it has found. Raises RuntimeError in a process that has joined a process group."""

    def __init__(self, config: Config, architecture: Architecture):
        self._architecture = architecture
        self._dtype = DTYPES[config.precision]
        self._states = StageStates(config, architecture)
        self._activations = StageActivations(config, architecture)
        self._trains_tokens = not frozen_parts(architecture, config.freeze).text.layers.embedding

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
            pixels = prod(self._architecture.vision.image_size) if chunks[0].is_first else 0
            pictures = pairs * 3 * pixels * itemsize
            found.append(replace(state, activations=saved, pictures=pictures))
        return tuple(found)

    def message_bytes(self, plan: LayoutPlan) -> int:
        """Of what a stage hands on of one microbatch."""
        sequence_ranks = plan.layout.tensor if plan.layout.sequence else 1
        captions = plan.batch.captions
        messages = MessageLayout(self._architecture, plan.stages, sequence_ranks, captions)
        return messages.length(plan.batch.micro_batch, training=True) * self._dtype.itemsize

    def layer_bytes(self, layout: Layout, recompute: str) -> int:
        """Bytes that a trained layer keeps of one pair, of the tower where it is more."""
        return self._activations.of_layer(layout, recompute)

    def token_table_bytes(self, layout: Layout) -> int:
        """Bytes of the token embedding's gradient on a tensor rank, the largest that a weight has;
        0 where it is frozen."""
        text = self._architecture.text
        rows = ROWS.local_length(text.vocab_size, layout.tensor)
        return self._trains_tokens * rows * text.width * self._dtype.itemsize
