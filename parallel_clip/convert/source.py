"""Weights to start from, evaluate or convert: a run, one of its checkpoints, or OpenCLIP's files.

Whatever the kind, tensors are read by their global name (that of an OpenCLIP state dict) and full
shape. Pickled files are read with `weights_only=True`: nothing in them is run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.convert.names import parameter_table
from parallel_clip.errors import InputError
from parallel_clip.model.architectures import Architecture, architecture_from_json

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Facts:
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

    facts: Facts

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of each tensor by its name."""

    def read(self, name: str) -> Tensor:
        """A full tensor, on the CPU, in the precision in which it is stored."""


def open_source(path: str | Path) -> WeightSource:
    """Open a run folder (its latest checkpoint), a checkpoint folder, or OpenCLIP's file or folder.

    Raises:
        InputError: it is none of these, or is not whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist (paths start from {Path.cwd()}); give a run folder, "
            "a checkpoint folder, or an OpenCLIP file or folder"
        )
    if path.is_file():
        return OpenClipSource(path)
    newest = commit.latest(path)
    if newest is not None:
        return CheckpointSource(newest)
    if (path / META_FILE).is_file():
        return CheckpointSource(path)
    for name in OPENCLIP_WEIGHTS:
        if (path / name).is_file():
            return OpenClipSource(path / name)
    if (path / "config.json").is_file():
        raise InputError(
            f"{path} looks like a Hugging Face checkpoint, which is not read yet; "
            "give an OpenCLIP checkpoint (open_clip_model.safetensors) of the same model"
        )
    raise InputError(
        f"{path} holds no checkpoint: expected a run folder (checkpoints/latest), a checkpoint "
        f"folder ({META_FILE}), or an OpenCLIP folder ({' or '.join(OPENCLIP_WEIGHTS)})"
    )


class CheckpointSource:
    """The weights (fp32 masters) of one of our checkpoints."""

    def __init__(self, folder: Path):
        meta = Meta.read(folder)
        self._reader = PieceReader(folder)
        self.facts = Facts(
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


class OpenClipSource:
    """An OpenCLIP state dict in safetensors or as torch saves it, with its config if beside it."""

    def __init__(self, file: Path):
        self._file = file
        config = file.parent / OPENCLIP_CONFIG
        architecture = preprocess = None
        if config.is_file():
            try:
                settings = json.loads(config.read_text())
                preprocess = settings.get("preprocess_cfg")
                architecture = architecture_from_json(settings["model_cfg"], file.parent.name)
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise InputError(f"{config} is not an OpenCLIP config: {error!r}") from None
        self.facts = Facts(architecture, preprocess, tokenizer=None, folder=file.parent)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._file.suffix == ".safetensors":
            return {n: tuple(self._safetensors.get_slice(n).get_shape())
                    for n in self._safetensors.keys()}  # fmt: skip
        return {name: tuple(tensor.shape) for name, tensor in self._pickled.items()}

    def read(self, name: str) -> Tensor:
        if self._file.suffix == ".safetensors":
            return self._safetensors.get_tensor(name)
        return self._pickled[name]

    @cached_property
    def _safetensors(self) -> safe_open:
        try:
            return safe_open(self._file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self._file} is not a safetensors file: {error}") from None

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        try:
            # Only torch's newer format, a zip, can be mapped into memory.
            content = torch.load(
                self._file,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(self._file),
            )
        except (OSError, EOFError) as error:
            raise InputError(f"{self._file} cannot be read: {error}") from None
        except (RuntimeError, ValueError, pickle.UnpicklingError):
            raise InputError(
                f"{self._file} is no torch file of plain tensors; a damaged one has to be fetched "
                "again, and from one that holds more (code could be run by reading it) the state "
                "dict has to be saved alone, as .safetensors or with torch.save"
            ) from None
        # open_clip_train saves {"state_dict": ..., "optimizer": ...}; DDP adds "module.".
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not state or not all(isinstance(v, Tensor) for v in state.values()):
            raise InputError(f"{self._file} holds no state dict of tensors")
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}


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
