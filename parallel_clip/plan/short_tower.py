"""A few layers of one tower, as a stage of a short model, to count on what is alike in all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from parallel_clip.engine.groups import Groups
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.clip import CLIPModel
from parallel_clip.model.frozen import FrozenParts, FrozenTower
from parallel_clip.model.layer_groups import layer_of
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.stages.stage import LayerRange, Stage

TowerName = Literal["vision", "text"]


def short_tower(
    architecture: Architecture,
    frozen_model: FrozenParts,
    tower: TowerName,
    held: LayerRange,
    counts: tuple[int, ...],
    options: ModelOptions,
    groups: Groups,
) -> CLIPModel:
    """The trainer's own module of a stage that holds of one tower as `held` says, but only `counts`
    layers of each of `layer_kinds`, and nothing of the other."""
    frozen: FrozenTower = getattr(frozen_model, tower)
    layers, position = [], held.first
    for kind, count in zip(layer_kinds(held, frozen), counts, strict=True):
        layers += range(position, position + count)
        position += kind
    before = [held.first - 1] if held.first else []
    behind = [] if held.is_finished else [held.stop]
    short_model, parts = _shortened(architecture, frozen_model, tower, [*before, *layers, *behind])
    total = len(before) + len(layers) + len(behind)
    short = LayerRange(len(before), len(before) + len(layers), total)
    stages, number = _stages_around(tower, short, short_model)
    return CLIPModel(short_model, options, groups.tensor, stages, number, parts)


def layer_kinds(held: LayerRange, frozen: FrozenTower) -> tuple[int, int, int]:
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
