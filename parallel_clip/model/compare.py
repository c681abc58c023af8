"""Two descriptions of one model: in which switches they differ, and whether that is meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture

Tower = Literal["vision", "text"]

# What may change while weights stay: positions are interpolated.
SIZES = frozenset({"vision_cfg.image_size", "text_cfg.context_length"})


class Difference(NamedTuple):
    """A key of OpenCLIP's model config ("vision_cfg.pool_type"), and its two values."""

    key: str
    one: Any
    other: Any

    def is_named(self, names: Collection[str]) -> bool:
        """Whether `names` has the key, or its last part."""
        return self.key in names or self.key.rpartition(".")[2] in names


def differences(one: Architecture, other: Architecture) -> list[Difference]:
    """The settings that decide the features and differ between two models."""
    return _differing(one.settings(), other.settings())


def tower_differences(
    one: Architecture, other: Architecture, towers: Iterable[Tower]
) -> list[Difference]:
    """Those of some towers alone. How wide the features are belongs to no tower."""
    found = (_differing(one.tower_settings(t), other.tower_settings(t)) for t in towers)
    return list({d.key: d for differing in found for d in differing}.values())


def in_words(found: Iterable[Difference]) -> str:
    """Differences between a checkpoint, which is the one, and what is named here."""
    return ", ".join(f"{d.key} is {d.one!r} there and {d.other!r} here" for d in found)


def _differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(key, left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


DROP_PATH = "vision_cfg.timm_drop_path"
# As an override has it. It matters in training alone, whoever names the model.
DROP_PATH_NAMES = frozenset({DROP_PATH, "timm_drop_path"})


def check_override(names: Collection[str], architecture: Architecture, option: str) -> None:
    """InputError: an override names what is no setting. option: how the user gave it."""
    keys = [*architecture.settings(), DROP_PATH]
    known = {*keys, *(key.rpartition(".")[2] for key in keys)}
    for name in names:
        if name not in known:
            raise InputError(f"{option} names {name!r}; there are {', '.join(sorted(keys))}")
