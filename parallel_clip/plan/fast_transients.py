"""What comes and goes beside the saved activations while a microbatch goes backward, counted on a
layer: gradients on their way, and what is computed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from parallel_clip.config import Config
from parallel_clip.engine.fake_world import FakeAnswers, fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.model.megatron_config import DTYPES, ModelOptions
from parallel_clip.model.parameters import ROWS
from parallel_clip.optimizer.train_state import wrap_for_data_parallel
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.live_bytes import LiveBytes
from parallel_clip.plan.memory import stage_inputs
from parallel_clip.plan.short_tower import TowerName, layer_kinds, short_tower
from parallel_clip.stages.stage import LayerRange, Stage

# Of so many pairs what grows with them is nearly all; of one pair gradients of weights are most,
# and fill more at another moment.
_MANY = 1_000_000


class _Line(NamedTuple):
    """Bytes by pairs: constant + pairs × each."""

    constant: int
    each: int

    def at(self, pairs: int) -> int:
        return self.constant + pairs * self.each


class StageTransients:
    """Of one model, as one config trains it. Keeps what it has counted. Raises RuntimeError in a
    process that has joined a process group."""

    def __init__(self, config: Config, architecture: Architecture):
        self._config, self._architecture = config, architecture
        self._frozen = frozen_parts(architecture, config.freeze)
        self._itemsize = DTYPES[config.precision].itemsize
        self._captions = config.data.captions_per_image
        self._found: dict[tuple, _Line] = {}

    def of(
        self, stage: Stage, layout: Layout, recompute: str, pairs: int, saved: Mapping[str, int]
    ) -> int:
        """The most bytes beside all that a microbatch's graph has saved on a stage, during its
        backward pass. saved: by part of the model."""
        most, freed = 0, 0
        for tower in ("text", "vision"):  # in the order of backward
            held: LayerRange = getattr(stage, tower)
            frozen = getattr(self._frozen, tower)
            # Where nothing in or before its layers is trained, nothing goes backward.
            if held.stop <= frozen.layers.without_backward or held.layers == 0 or frozen.whole:
                continue
            most = max(most, self._line(tower, held, layout, recompute).at(pairs) - freed)
            freed += sum(size for part, size in saved.items() if part.startswith(f"{tower}."))
            if tower == "vision":
                continue
            if held.first:  # waits for that of pictures, to go back with it
                freed -= self._text_gradient(layout) * pairs
            elif not frozen.layers.embedding:
                most = max(most, self._embedding_gradient(layout) - freed)
        return most

    def _text_gradient(self, layout: Layout) -> int:
        """Of the hidden states of a picture's texts on a rank."""
        text, ranks = self._architecture.text, layout.tensor if layout.sequence else 1
        tokens = -(-text.training_tokens // ranks)
        return self._captions * tokens * text.width * self._itemsize

    def _embedding_gradient(self, layout: Layout) -> int:
        """Of the table of tokens: as large as it is, since it is not a sparse one."""
        text = self._architecture.text
        rows = ROWS.local_length(text.vocab_size, layout.tensor)
        return rows * text.width * self._itemsize

    def _line(self, tower: TowerName, held: LayerRange, layout: Layout, recompute: str) -> _Line:
        sequence = layout.sequence and layout.tensor > 1
        kinds = layer_kinds(held, getattr(self._frozen, tower))
        # The last kind that is there goes backward first; layers in front of it fill no more.
        last = max(number for number, count in enumerate(kinds) if count)
        key = tower, last, held.has_head, layout.tensor, sequence, recompute
        if key not in self._found:
            options = ModelOptions(
                self._config.precision, recompute, sequence, captions=self._captions
            )
            total = held.total
            first = held.stop - kinds[last]
            part = LayerRange(first, held.stop, total)
            if first == 0 and part.layers > 1:  # no embedding in it
                part = LayerRange(1, held.stop, total)
            counts = tuple(int(number == last) for number in range(len(kinds)))
            with fake_rank(Layout(layout.tensor, layout.tensor)) as groups, FakeAnswers():
                self._found[key] = self._probe(tower, part, counts, options, groups)
        return self._found[key]

    def _probe(
        self,
        tower: TowerName,
        held: LayerRange,
        counts: tuple[int, ...],
        options: ModelOptions,
        groups: Groups,
    ) -> _Line:
        with LiveBytes() as live:
            model = short_tower(
                self._architecture, self._frozen, tower, held, counts, options, groups
            )
            (wrapped,) = wrap_for_data_parallel([model], distributed_optimizer=False)
            one, many = (
                _beside_saved(wrapped, model, pairs, groups.device, live) for pairs in (1, _MANY)
            )
        each, constant = divmod(many, _MANY)
        return _Line(max(constant, one - each), each)


def _beside_saved(
    wrapped: torch.nn.Module, model: CLIPModel, pairs: int, device: torch.device, live: LiveBytes
) -> int:
    """Run `pairs` forward and backward: the most bytes at once beside what forward has left and
    the gradient of what is handed on."""
    inputs, _message = stage_inputs(model, pairs, device)
    result = wrapped(*inputs)
    gradient = torch.zeros_like(result)
    before, peaks = live.now, {}
    with live.peak_of(peaks, "backward"):
        result.backward(gradient)
    return peaks["backward"] - before
