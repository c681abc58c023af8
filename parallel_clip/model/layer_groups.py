"""The layer groups of a tower, from its input to its projection: what layer-wise learning rates and
partly frozen towers count.

They are those of OpenCLIP 3.3: `VisionTransformer.lock` and `lock_text_tower` in
open_clip/transformer.py, and for image towers of timm 1.0 the `group_matcher` of
timm/models/vision_transformer.py and eva.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.parameters import Parameter


class LayerGroups(NamedTuple):
    """The layer groups of one tower.

    number: of each parameter, by its name in an OpenCLIP state dict: 0 for patch, class, token and
        position embeddings and the norm before the first block; then one group a block, the last
        with the tower's last norm; outermost the projection, for timm with the attention pool.
        A group that the tower has nothing of is not counted.
    count: of groups; the outermost is count - 1.
    lockable: OpenCLIP 3.3's `lock(unlocked_groups=N)` counts the groups 0 to lockable - 1, of which
        it freezes all but the last N. The linear layer that OpenCLIP puts behind a trunk of timm is
        a group beyond those and trains always; OpenCLIP 4 counts, and locks, it with the others.
    """

    number: dict[str, int]
    count: int
    lockable: int


class TowerGroups(NamedTuple):
    """Of both towers. `logit_scale` and `logit_bias` are in neither."""

    vision: LayerGroups
    text: LayerGroups


def layer_groups(architecture: Architecture) -> TowerGroups:
    """The layer groups of both towers of `architecture`."""
    table = parameter_table(architecture)
    vision, text = architecture.vision, architecture.text
    return TowerGroups(
        _groups_of([p for p in table if p.module.startswith("vision.")], vision.layers),
        _groups_of([p for p in table if p.module.startswith("text.")], text.layers),
    )


def _groups_of(parameters: list[Parameter], layers: int) -> LayerGroups:
    places = {parameter.name: _place(parameter, layers) for parameter in parameters}
    present = sorted(set(places.values()))
    number = {name: present.index(place) for name, place in places.items()}
    lockable = sum(place <= layers + 1 for place in present)
    return LayerGroups(number, len(present), lockable)


_BLOCK = re.compile(r"(?:vision|text)\.block\.layers\.(\d+)\.")


def layer_of(module: str) -> int | None:
    """The number of the layer that a module of a tower belongs to; None: it is before or behind
    the layers."""
    block = _BLOCK.match(module)
    return int(block[1]) if block else None


def _place(parameter: Parameter, layers: int) -> int:
    """How far out a parameter is: 0 to `layers` + 2, not each of which every tower has."""
    layer = layer_of(parameter.module)
    if layer is not None:
        return layer + 1
    match parameter.module.split(".")[1]:
        case "post_norm":
            return layers
        case "pool":
            return layers + 1
        case "projection":
            return layers + (2 if parameter.name.startswith("visual.head.") else 1)
    return 0
