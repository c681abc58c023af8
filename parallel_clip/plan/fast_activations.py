"""What a forward pass keeps for its backward pass, counted on a layer or two of each kind.

The trainer's own code runs under fake tensors, as in `count_stages`, but once for what is alike:
layers of a kind keep alike, so that one and two of them say what any number keeps, and a tower
keeps the same whatever the other does. Closed forms were not taken: they would be a second copy of
the layers, to be kept right through each change of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from parallel_clip.config import Config
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import normalised
from parallel_clip.model.frozen import FrozenTower
from parallel_clip.model.megatron_config import DTYPES, ModelOptions
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.memory import saved_beside_message
from parallel_clip.plan.saved_activations import SavedActivations
from parallel_clip.plan.short_tower import TowerName, layer_kinds, short_tower
from parallel_clip.stages.stage import LayerRange, Stage

# Pairs of a probe. What does not grow with the pairs is less than so many bytes, so that one pass
# tells both: bytes = constant + pairs × bytes of a pair.
_PROBE_PAIRS = 8_000_009


class _Saved(NamedTuple):
    """Bytes that a tower keeps, by its parts: (constant, of a pair); and whether it keeps what the
    stage before handed on, which is not among them."""

    parts: dict[str, tuple[int, int]]
    keeps_message: bool


class StageActivations:
    """Of one model, as one config trains it. Keeps what it has counted. Raises RuntimeError in a
    process that has joined a process group."""

    def __init__(self, config: Config, architecture: Architecture):
        self._config, self._architecture = config, architecture
        self._frozen = frozen_parts(architecture, config.freeze)
        self._dtype = DTYPES[config.precision]
        self._captions = config.data.captions_per_image
        self._saved: dict[tuple, _Saved] = {}

    def of(
        self, stage: Stage, layout: Layout, recompute: str, pairs: int, message_bytes: int
    ) -> dict[str, int]:
        """Bytes that a forward pass of one microbatch keeps on a stage, by part of the model."""
        sequence = layout.sequence and layout.tensor > 1
        key = "stage", stage.is_last, stage.vision, stage.text, layout.tensor, sequence, recompute
        if key not in self._saved:
            saved = [
                self._tower(name, getattr(stage, name), layout, recompute)
                for name in ("vision", "text")
                if getattr(stage, name).layers
            ]
            if stage.is_last:
                saved.append(self._features(stage))
            parts = {part: size for each in saved for part, size in each.parts.items()}
            self._saved[key] = _Saved(parts, any(each.keeps_message for each in saved))
        saved = self._saved[key]
        found = {part: constant + pairs * each for part, (constant, each) in saved.parts.items()}
        if saved.keeps_message:  # all of it, whichever part is used
            found["what the stage before handed on"] = message_bytes
        return found

    def _features(self, stage: Stage) -> _Saved:
        """The norms of the features, on the last stage."""
        key = "features", stage.vision.layers > 0, stage.text.layers > 0
        if key not in self._saved:
            with fake_rank(Layout(1)):
                self._saved[key] = self._probe_features(stage)
        return self._saved[key]

    def _probe_features(self, stage: Stage) -> _Saved:
        inputs, received = [], []
        for name, count in (("vision", 1), ("text", self._captions)):
            shape = count * _PROBE_PAIRS, self._architecture.embed_dim
            features = torch.zeros(shape, dtype=self._dtype)
            features.requires_grad_(not getattr(self._frozen, name).whole)
            inputs.append(features)
            if not getattr(stage, name).layers:
                received.append(features)
        with SavedActivations(nn.Module(), excluded=received) as saved:
            kept = torch.cat([normalised(features) for features in inputs])
        del kept
        return _Saved(_by_pairs(saved.by_module), any(map(saved.was_kept, received)))

    def _tower(self, tower: TowerName, held: LayerRange, layout: Layout, recompute: str) -> _Saved:
        frozen: FrozenTower = getattr(self._frozen, tower)
        kinds = layer_kinds(held, frozen)
        saved = self._short_tower(tower, held, tuple(min(n, 2) for n in kinds), layout, recompute)
        parts = saved.parts
        for number, count in enumerate(kinds):
            if count > 2:
                one = tuple(1 if i == number else min(n, 2) for i, n in enumerate(kinds))
                before = self._short_tower(tower, held, one, layout, recompute).parts
                parts = _added(parts, _added(saved.parts, before, -1), count - 2)
        return _Saved(parts, saved.keeps_message)

    def _short_tower(
        self,
        tower: TowerName,
        held: LayerRange,
        counts: tuple[int, ...],
        layout: Layout,
        recompute: str,
    ) -> _Saved:
        """As `_tower`, of a part with `counts` layers of each kind."""
        frozen: FrozenTower = getattr(self._frozen, tower)
        after_trained = held.first > frozen.layers.without_backward
        sequence = layout.sequence and layout.tensor > 1
        key = (
            *(tower, counts, held.has_embedding, held.has_head, after_trained),
            *(layout.tensor, sequence, recompute),
        )
        if key not in self._saved and not held.first and counts[2] == 2 and not frozen.names:
            # A probe is spared: a second layer adds the same behind an embedding as behind a layer.
            first, one, two = (
                self._short_tower(tower, part, (0, 0, layers), layout, recompute)
                for part, layers in ((held, 1), (LayerRange(1, 2, 4), 1), (LayerRange(1, 3, 4), 2))
            )
            layer = _added(two.parts, one.parts, -1)
            self._saved[key] = _Saved(_added(first.parts, layer), first.keeps_message)
        if key not in self._saved and held.has_head and held.first and not frozen.names:
            # A probe is spared: the head adds the same behind any layers.
            def kept(first: int, stop: int) -> dict[str, tuple[int, int]]:
                part = LayerRange(first, stop, 3)
                return self._short_tower(tower, part, (0, 0, part.layers), layout, recompute).parts

            whole = LayerRange(0, 1, 1)
            with_head = self._short_tower(tower, whole, (0, 0, 1), layout, recompute).parts
            middle = self._short_tower(
                tower, LayerRange(1, 1 + counts[2], 4), counts, layout, recompute
            )
            parts = _added(with_head, kept(0, 1), -1)
            self._saved[key] = _Saved(_added(middle.parts, parts), middle.keeps_message)
        if key not in self._saved:
            options = ModelOptions(
                self._config.precision, recompute, sequence, captions=self._captions
            )
            with fake_rank(Layout(layout.tensor, layout.tensor)) as groups:
                self._saved[key] = self._probe(tower, held, counts, options, groups)
        return self._saved[key]

    def _probe(
        self,
        tower: TowerName,
        held: LayerRange,
        counts: tuple[int, ...],
        options: ModelOptions,
        groups: Groups,
    ) -> _Saved:
        """Build the trainer's own module of some layers of one tower, and run it."""
        model = short_tower(self._architecture, self._frozen, tower, held, counts, options, groups)
        found, keeps_message = saved_beside_message(model, _PROBE_PAIRS, groups.device)
        return _Saved(_by_pairs(found), keeps_message)


def _added(
    parts: Mapping[str, tuple[int, int]], others: Mapping[str, tuple[int, int]], times: int = 1
) -> dict[str, tuple[int, int]]:
    """Each part with `times` that of the others."""
    return {
        name: tuple(
            one + times * other
            for one, other in zip(parts.get(name, (0, 0)), others.get(name, (0, 0)), strict=True)
        )
        for name in [*parts, *(name for name in others if name not in parts)]
    }


def _by_pairs(found: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(constant, of a pair) of bytes that `_PROBE_PAIRS` pairs keep."""
    of_parts = {part: divmod(size, _PROBE_PAIRS) for part, size in found.items()}
    return {part: (constant, of_pair) for part, (of_pair, constant) in of_parts.items()}
