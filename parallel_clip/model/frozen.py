"""What of a model is not trained, in terms of parameters and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import LayerGroups, layer_groups, layer_of
from parallel_clip.stages.costs import FrozenLayers, ModelCosts
from parallel_clip.stages.stage import LayerRange


@dataclass(frozen=True)
class FrozenTower:
    """names: of the tower's frozen parameters, as in an OpenCLIP state dict; layers: how far the
    backward pass gets; whole: nothing of the tower is trained."""

    names: frozenset[str] = frozenset()
    layers: FrozenLayers = FrozenLayers()

    @property
    def whole(self) -> bool:
        return self.layers.whole

    def leading_layers(self, held: LayerRange) -> int:
        """How many of the layers that a stage holds come before all that is trained."""
        return min(max(self.layers.without_backward - held.first, 0), held.layers)

    def wants_gradient_before(self, held: LayerRange) -> bool:
        """Whether anything is trained in front of the layers of a stage: whether what the stage
        before hands on has a gradient."""
        if held.first == held.total:  # features
            return not self.whole
        return held.first > self.layers.without_backward


@dataclass(frozen=True)
class FrozenParts:
    """Of both towers. The logit parameters are always trained."""

    vision: FrozenTower = FrozenTower()
    text: FrozenTower = FrozenTower()

    @property
    def names(self) -> frozenset[str]:
        return self.vision.names | self.text.names

    def costs_of(self, architecture: Architecture) -> ModelCosts:
        """The model's costs, with the backward passes that are spared."""
        costs = architecture.costs
        return replace(
            costs,
            vision=replace(costs.vision, frozen=self.vision.layers),
            text=replace(costs.text, frozen=self.text.layers),
        )


NOTHING_FROZEN = FrozenParts()


def freeze_tower(
    architecture: Architecture,
    tower: Literal["vision", "text"],
    unlocked_groups: int | None = None,
    norms: bool = False,
) -> FrozenTower:
    """Freeze a tower but for its last `unlocked_groups` layer groups, counted as OpenCLIP 3.3's
    `--lock-image-unlocked-groups` and `--lock-text-unlocked-layers` do, from the projection (see
    layer_groups.py); None: all of it. norms: train the LayerNorms of the frozen groups, too.

    Raises:
        InputError: there are fewer groups.
    """
    groups: LayerGroups = getattr(layer_groups(architecture), tower)
    modules = {p.name: p.module for p in parameter_table(architecture)}
    names = frozenset(groups.number)
    if unlocked_groups is not None:
        count = groups.lockable - unlocked_groups
        if count < 0:
            raise InputError(
                f"freeze.{tower}.unlocked_groups {unlocked_groups} is more than the "
                f"{groups.lockable} groups of the {tower} tower of {architecture.name}; set "
                f"freeze.{tower} to null to train all of it"
            )
        names = frozenset(name for name, number in groups.number.items() if number < count)
    if norms:
        names = frozenset(name for name in names if not _is_norm(modules[name]))
    trained = {name: modules[name] for name in groups.number.keys() - names}
    layers = getattr(architecture, tower).layers
    return FrozenTower(names, _frozen_layers(trained, groups, layers))


def _frozen_layers(trained: Mapping[str, str], groups: LayerGroups, layers: int) -> FrozenLayers:
    """trained: the modules of the tower's parameters that are, by name."""
    embedding = [module for name, module in trained.items() if groups.number[name] == 0]
    of_layers: list[list[str]] = [[] for _ in range(layers)]
    for module in trained.values():
        layer = layer_of(module)
        if layer is not None:
            of_layers[layer].append(module)
    nothing = [not modules for modules in of_layers]
    norms_alone = [all(map(_is_norm, modules)) for modules in of_layers]
    return FrozenLayers(
        embedding=all(map(_is_norm, embedding)),
        without_backward=0 if embedding else _leading(nothing),
        matrices=_leading(norms_alone),
        whole=not trained,
    )


def _leading(holds: Sequence[bool]) -> int:
    """Of how many of the first it holds."""
    return len(list(takewhile(bool, holds)))


def _is_norm(module: str) -> bool:
    """Whether a parameter is a weight or bias of a LayerNorm; see `norm_parameters`."""
    return module.split(".")[-2].endswith("norm")
