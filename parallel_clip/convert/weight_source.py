"""Weights of a model in a checkpoint of any format, and the check that they fit an architecture.

Whatever the format, tensors are read by their global name (that of an OpenCLIP state dict) and full
shape. There is one file a format: native.py and openclip.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table


@dataclass(frozen=True)
class SourceMetadata:
    """The model, preprocessing and tokenizer that a source names; None where it names none.

    architecture; preprocess: OpenCLIP's preprocess_cfg; tokenizer: the `data.tokenizer` it was
    trained with; folder: where tokenizer files may lie; step: optimizer steps done.
    """

    architecture: Architecture | None
    preprocess: dict[str, Any] | None
    tokenizer: str | None
    folder: Path
    step: int | None = None


class WeightSource(Protocol):
    """An opened checkpoint: tensors by global name, and the metadata stored with them."""

    metadata: SourceMetadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of each tensor by its name."""

    def read(self, name: str) -> Tensor:
        """A full tensor, on the CPU, in the precision in which it is stored."""


class ModelWeights:
    """A source's tensors for one architecture, checked to fit it before anything is read.

    optional: names that the source may lack; `read` gives None for those.

    Raises:
        InputError: tensors are missing, of another shape, or not part of the model.
    """

    def __init__(
        self, source: WeightSource, architecture: Architecture, optional: tuple[str, ...] = ()
    ):
        self.architecture = architecture
        self.metadata = source.metadata
        self._source = source
        self._shapes = shapes = source.shapes()
        table = parameter_table(architecture)
        self._stored = {p.name: _stored_name(p.name, shapes) for p in table}
        problems = []
        for parameter in table:
            stored = self._stored[parameter.name]
            if stored not in shapes:
                if parameter.name not in optional:
                    problems.append(f"{parameter.name} is missing")
            elif _scalar_as_empty(shapes[stored]) != _scalar_as_empty(parameter.shape):
                problems.append(
                    f"{parameter.name} is {list(shapes[stored])}, not {list(parameter.shape)}"
                )
        unexpected = shapes.keys() - set(self._stored.values()) - {"attn_mask", "text.attn_mask"}
        problems += [f"{name} is not part of the model" for name in sorted(unexpected)]
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"the checkpoint in {source.metadata.folder} is of another architecture than "
                f"{architecture.name}: {'; '.join(problems[:3])}{more}; "
                "set model.name to the checkpoint's model"
            )

    def read(self, name: str) -> Tensor | None:
        """A full tensor on the CPU, in its stored precision; None where the source lacks it."""
        stored = self._stored[name]
        if stored not in self._shapes:
            return None
        tensor = self._source.read(stored)
        return tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor of the architecture by its global name, contiguous."""
        return {name: self.read(name).contiguous() for name in self._stored}


def _stored_name(name: str, stored: dict[str, tuple[int, ...]]) -> str:
    """The name under which a source has `name`; `name` itself where it has it under neither.

    OpenCLIP has two classes that differ in nothing but a "text." before the text tower's names;
    either may be loaded into the other.
    """
    if name in stored:
        return name
    other = name.removeprefix("text.") if name.startswith("text.") else f"text.{name}"
    return other if other in stored else name


def _scalar_as_empty(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if shape == (1,) else shape


def make_empty_folder(target: Path) -> None:
    """Make the folder to convert to. InputError: it holds something, or cannot be made."""
    try:
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} is not empty; name a new folder")
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}") from None
