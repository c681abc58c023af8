"""What a forward pass keeps for its backward pass, counted on a layer or two of each kind.

The trainer's own code runs under fake tensors, as in `count_stages`, but once for what is alike:
layers of a kind keep alike, so that one and two of them say what any number keeps, and a tower
keeps the same whatever the other does. Closed forms were not taken: they would be a second copy of
the layers, to be kept right through each change of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from parallel_clip.config import Config, Freeze
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.clip import CLIPModel, normalised
from parallel_clip.model.frozen import FrozenParts, FrozenTower
from parallel_clip.model.layer_groups import layer_of
from parallel_clip.model.megatron_config import DTYPES, ModelOptions
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.memory import saved_beside_message
from parallel_clip.plan.saved_activations import SavedActivations
from parallel_clip.stages.stage import LayerRange, Stage

TowerName = Literal["vision", "text"]

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
        self._unfrozen: StageActivations | None = None

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

    def of_layer(self, layout: Layout, recompute: str) -> int:
        """Bytes that a trained layer in the middle of a tower keeps of one pair, of the tower where
        it is more."""
        if self._frozen.names:
            config = self._config.model_copy(update={"freeze": Freeze()})
            self._unfrozen = self._unfrozen or StageActivations(config, self._architecture)
            return self._unfrozen.of_layer(layout, recompute)
        sizes = []
        for tower in ("vision", "text"):
            one, two = (
                self._tower(tower, LayerRange(1, stop, 4), layout, recompute).parts.values()
                for stop in (2, 3)
            )
            sizes.append(sum(each for _, each in two) - sum(each for _, each in one))
        return max(sizes)

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
        kinds = _kinds(held, frozen)
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
        frozen: FrozenTower = getattr(self._frozen, tower)
        layers, position = [], held.first
        for kind, count in zip(_kinds(held, frozen), counts, strict=True):
            layers += range(position, position + count)
            position += kind
        before = [held.first - 1] if held.first else []
        behind = [] if held.is_finished else [held.stop]
        architecture, parts = _shortened(
            self._architecture, self._frozen, tower, [*before, *layers, *behind]
        )
        total = len(before) + len(layers) + len(behind)
        short = LayerRange(len(before), len(before) + len(layers), total)
        stages, number = _stages_around(tower, short, architecture)
        model = CLIPModel(architecture, options, groups.tensor, stages, number, parts)
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


def _kinds(held: LayerRange, frozen: FrozenTower) -> tuple[int, int, int]:
    """Layers of a stage by kind: nothing trained in or before them; norms alone are trained; all
    others."""
    bounds = [held.first, frozen.layers.without_backward, frozen.layers.matrices, held.stop]
    inside = [min(max(bound, held.first), held.stop) for bound in bounds]
    first, leading, matrices, stop = inside
    matrices = max(leading, matrices)
    return leading - first, matrices - leading, stop - matrices


def _shortened(
    architecture: Architecture, frozen: FrozenParts, tower: TowerName, layers: Sequence[int]
) -> tuple[Architecture, FrozenParts]:
    """The model with only these layers of a tower, and what of them is frozen."""
    short = replace(getattr(architecture, tower), layers=len(layers))
    short_model = replace(architecture, **{tower: short})
    of_tower: FrozenTower = getattr(frozen, tower)
    if not of_tower.names:
        return short_model, frozen
    names = {p.module: p.name for p in parameter_table(architecture)}
    kept = set()
    for parameter in parameter_table(short_model):
        module = parameter.module
        if not module.startswith(f"{tower}."):
            continue
        number = layer_of(module)
        if number is not None:
            place = f"{tower}.block.layers."
            module = module.replace(f"{place}{number}.", f"{place}{layers[number]}.", 1)
        if names[module] in of_tower.names:
            kept.add(parameter.name)
    limits = of_tower.layers
    limits = replace(
        limits,
        without_backward=sum(layer < limits.without_backward for layer in layers),
        matrices=sum(layer < limits.matrices for layer in layers),
    )
    return short_model, replace(frozen, **{tower: FrozenTower(frozenset(kept), limits)})


def _stages_around(
    tower: TowerName, held: LayerRange, architecture: Architecture
) -> tuple[list[Stage], int]:
    """The stages of a pipeline of which one holds these layers of a tower and nothing else, and
    its number: not the last one, and for a text tower not the first. The image tower has ended
    before a text tower's stage, and no text tower has begun before an image tower's."""
    other: TowerName = "text" if tower == "vision" else "vision"
    total = getattr(architecture, other).layers
    bounds = [(held.first, held.stop), (held.stop, held.total)]
    if held.first or tower == "text":
        bounds.insert(0, (0, held.first))
    count, number = len(bounds), len(bounds) - 2
    # Where all layers of the other tower are.
    full = count - 1 if tower == "vision" else 0
    stages = []
    for n, bound in enumerate(bounds):
        rest = LayerRange(0 if n <= full else total, total if n >= full else 0, total)
        stages.append(Stage(n, count, **{tower: LayerRange(*bound, held.total), other: rest}))
    return stages, number
