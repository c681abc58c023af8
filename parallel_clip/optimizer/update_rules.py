"""How AdamW updates each parameter: its learning rate, as a part of that of the step, and whether
weight decay acts on it. A pure function of the model and the config, the same on every rank."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from parallel_clip.config import Optimizer as OptimizerSettings
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import TowerGroups, layer_groups
from parallel_clip.model.parameters import Parameter


class UpdateRule(NamedTuple):
    """lr_scale: the parameter's learning rate is so many times that of the step."""

    lr_scale: float
    decayed: bool


def update_rules(architecture: Architecture, settings: OptimizerSettings) -> dict[str, UpdateRule]:
    """The rule of every parameter, by its name in an OpenCLIP state dict.

    With peak p of its part of the model, layer decay d, and group g of G layer groups, lr_scale is
    p / `optimizer.lr` · d^(G - 1 - g), as in BEiT (arXiv 2106.08254; layer ids of
    https://github.com/microsoft/unilm/blob/master/beit/optim_factory.py) and timm's
    `param_groups_layer_decay`.

    Raises:
        InputError: a pattern of `optimizer.no_decay` matches no parameter.
    """
    table = parameter_table(architecture)
    groups, peaks = layer_groups(architecture), peak_scales(settings)
    spared = _spared(table, settings.no_decay)
    return {
        parameter.name: UpdateRule(
            _lr_scale(parameter.name, groups, peaks, settings),
            parameter.decayed and parameter.name not in spared,
        )
        for parameter in table
    }


def peak_scales(settings: OptimizerSettings) -> dict[str, float]:
    """`lr_vision`, `lr_text` and `lr_logit`, those that are set, in parts of `optimizer.lr`."""
    given = settings.model_dump(include={"lr_vision", "lr_text", "lr_logit"}, exclude_none=True)
    return {key: peak / settings.lr for key, peak in given.items()}


def layer_decay_of(settings: OptimizerSettings, tower: str) -> float:
    """That of `tower`, vision or text; 1: there is none."""
    decay = settings.layer_decay
    if isinstance(decay, dict):
        decay = decay.get(tower)
    return 1.0 if decay is None else decay


def _lr_scale(
    name: str, groups: TowerGroups, peaks: dict[str, float], settings: OptimizerSettings
) -> float:
    for tower, of_tower in groups._asdict().items():
        if name in of_tower.number:
            above = of_tower.count - 1 - of_tower.number[name]
            return peaks.get(f"lr_{tower}", 1.0) * layer_decay_of(settings, tower) ** above
    return peaks.get("lr_logit", 1.0)


# The last part of the names that OpenCLIP 4 spares beside all of one dimension: what
# `no_weight_decay()` of its towers and of timm's trunks names. Token embeddings are not among them.
# `make_wd_exclude` in https://github.com/mlfoundations/open_clip/blob/
# 14f96576a0d93023a01875d7a051d4e0f04849f2/src/open_clip_train/optim.py, and `no_weight_decay` in
# src/open_clip/transformer.py there and in timm/models/vision_transformer.py and eva.py.
_EMBEDDINGS_OF_OPENCLIP_4 = ("positional_embedding", "class_embedding", "pos_embed", "cls_token")


def _spared(table: Sequence[Parameter], no_decay: str | list[str]) -> set[str]:
    """Names of parameters that do not decay, whatever their shape."""
    names = [parameter.name for parameter in table]
    if no_decay == "openclip3":
        return set()
    if no_decay == "openclip4":
        return {name for name in names if name.rpartition(".")[2] in _EMBEDDINGS_OF_OPENCLIP_4}
    return {name for pattern in no_decay for name in _matching(pattern, names)}


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(
            f"optimizer.no_decay: {pattern!r} matches no parameter of the model; patterns are for "
            f"OpenCLIP's names, such as {', '.join(_nearest(pattern, names))}"
        )
    return found


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """The three known names, block numbers left open, that are most like `pattern`."""
    wanted = re.sub(r"[*?\[\]]", "", pattern)

    def likeness(name: str) -> float:
        tail = name[-len(wanted) :]  # patterns mostly leave out how a name begins
        return max(difflib.SequenceMatcher(None, wanted, part).ratio() for part in (name, tail))

    return sorted(without_block_numbers(names), key=likeness, reverse=True)[:3]


def without_block_numbers(names: Iterable[str]) -> list[str]:
    """Each name once, with * for the number of its block."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
