"""Two descriptions of one model: in which switches they differ, and whether that is meant."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture


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
    left, right = one.settings(), other.settings()
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
