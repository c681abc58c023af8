"""What of a model is not trained: `freeze` of a config, in terms of parameters and layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from parallel_clip.config import Freeze, PartlyFrozen
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import LayerGroups, layer_groups
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


def frozen_parts(architecture: Architecture, freeze: Freeze) -> FrozenParts:
    """What `freeze` keeps from training.

    `unlocked_groups` counts as OpenCLIP 3.3's `--lock-image-unlocked-groups` and
    `--lock-text-unlocked-layers`, from the projection (see layer_groups.py).

    Raises:
        InputError: more groups are unlocked than there are.
    """
    groups = layer_groups(architecture)
    return FrozenParts(
        _frozen_tower(architecture, "vision", groups.vision, freeze.vision),
        _frozen_tower(architecture, "text", groups.text, freeze.text),
    )


def _frozen_tower(
    architecture: Architecture, tower: str, groups: LayerGroups, freeze: str | PartlyFrozen | None
) -> FrozenTower:
    if freeze is None:
        return FrozenTower()
    modules = {p.name: p.module for p in parameter_table(architecture)}
    if freeze == "all":
        names = frozenset(groups.number)
    else:
        count = groups.lockable - freeze.unlocked_groups
        if count < 0:
            raise InputError(
                f"freeze.{tower}.unlocked_groups {freeze.unlocked_groups} is more than the "
                f"{groups.lockable} groups of the {tower} tower of {architecture.name}; set "
                f"freeze.{tower} to null to train all of it"
            )
        names = frozenset(
            name
            for name, number in groups.number.items()
            if number < count and not (freeze.norms and _is_norm(modules[name]))
        )
    trained = [module for name, module in modules.items() if name in groups.number.keys() - names]
    return FrozenTower(names, _frozen_layers(trained, getattr(architecture, tower).layers))


def _frozen_layers(trained: Sequence[str], layers: int) -> FrozenLayers:
    """trained: the modules of the tower's parameters that are."""
    of_layers: list[list[str]] = [[] for _ in range(layers)]
    embedding = []
    for module in trained:
        block = _BLOCK.match(module)
        if block:
            of_layers[int(block[1])].append(module)
        elif module.split(".")[1] not in _BEHIND_BLOCKS:
            embedding.append(module)
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


_BLOCK = re.compile(r"\w+\.block\.layers\.(\d+)\.")
_BEHIND_BLOCKS = ("post_norm", "pool", "projection")


def _is_norm(module: str) -> bool:
    """Whether a parameter is a weight or bias of a LayerNorm; see `norm_parameters`."""
    return module.split(".")[-2].endswith("norm")
