"""Weights to start from, evaluate or convert: a run, one of its checkpoints, or OpenCLIP's files.

Whatever the kind, tensors are read by their global name (that of an OpenCLIP state dict) and full
shape. Pickled files are read with `weights_only=True`: nothing in them is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.openclip_json import architecture_from_json


@dataclass(frozen=True)
class SourceMetadata:
    """What a source says of its model; None where it says nothing.

    architecture; preprocess: OpenCLIP's preprocess_cfg; tokenizer: the `data.tokenizer` it was
    trained with; folder: where tokenizer files may lie; step: optimizer steps done.
    """

    architecture: Architecture | None
    preprocess: dict[str, Any] | None
    tokenizer: str | None
    folder: Path
    step: int | None = None


class WeightSource(Protocol):
    """Tensors by global name, and what is known of their model."""

    facts: SourceMetadata

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each tensor by its name."""

    def read(self, name: str) -> Tensor:
        """A full tensor, on the CPU, in the precision in which it is stored."""


class CheckpointSource:
    """The weights (fp32 masters) of one of our checkpoints."""

    def __init__(self, folder: Path):
        meta = Meta.read(folder)
        self._reader = PieceReader(folder)
        self.facts = SourceMetadata(
            architecture=architecture_from_json(meta.model, meta.model_name),
            preprocess=meta.preprocess,
            tokenizer=meta.tokenizer,
            folder=folder,
            step=meta.step,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        keys = [key for key in self._reader.keys() if key.startswith("weight:")]
        return {key.removeprefix("weight:"): self._reader.shape(key) for key in keys}

    def read(self, name: str) -> Tensor:
        return self._reader.read(f"weight:{name}")


class ModelWeights:
    """A source's tensors for one architecture, checked to fit it before anything is read.

    optional: names that the source may lack; `read` gives None for those.
    """

    def __init__(
        self, source: WeightSource, architecture: Architecture, optional: tuple[str, ...] = ()
    ):
        self._source = source
        shapes = source.shapes()
        self._stored = {name: _stored_name(name, shapes) for name in _names(architecture)}
        problems = []
        for parameter in parameter_table(architecture):
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
                f"the checkpoint in {source.facts.folder} is of another architecture than "
                f"{architecture.name}: {'; '.join(problems[:3])}{more}; "
                "set model.name to the checkpoint's model"
            )
        self._shapes = shapes

    def read(self, name: str) -> Tensor | None:
        """A full tensor as stored, or None where the source lacks it."""
        stored = self._stored[name]
        if stored not in self._shapes:
            return None
        tensor = self._source.read(stored)
        return tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor


def _names(architecture: Architecture) -> list[str]:
    return [parameter.name for parameter in parameter_table(architecture)]


def _stored_name(name: str, stored: dict[str, tuple[int, ...]]) -> str:
    """OpenCLIP has two classes that differ in nothing but a "text." before the text tower's names;
    either may be loaded into the other."""
    if name in stored:
        return name
    other = name.removeprefix("text.") if name.startswith("text.") else f"text.{name}"
    return other if other in stored else name


def _scalar_as_empty(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if shape == (1,) else shape
