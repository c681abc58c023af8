"""OpenCLIP's checkpoints: a folder or one of its files as a source, and writing such a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel_clip.convert.model_card import CARD
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.openai import openai_architecture
from parallel_clip.convert.precision import rounded, written_dtype
from parallel_clip.convert.streamed_safetensors import TensorSpec, write_safetensors
from parallel_clip.convert.target_folder import new_folder
from parallel_clip.convert.tensor_files import open_tensor_file
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.known_models import load_model

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# In the order of open_clip's `local-dir:`; other files of these kinds come after, if there is one.
_PREFERRED = (
    OPENCLIP_WEIGHTS[0],
    "open_clip_pytorch_model.safetensors",
    OPENCLIP_WEIGHTS[1],
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_KINDS = (".safetensors", ".bin", ".pth")


class OpenClipSource:
    """A state dict of OpenCLIP's or OpenAI's, with its config if one is beside it.

    notes: what to tell beside what is found here.
    """

    def __init__(self, file: Path, notes: tuple[str, ...] = ()):
        self._tensors = open_tensor_file(file)
        config = file.parent / OPENCLIP_CONFIG
        model, said_by = None, None
        if config.exists():
            model, said_by = load_model(str(config)), config
        architecture = model.architecture if model else openai_architecture(self.shapes(), file)
        if architecture is not None and model is None:
            said_by = file
            notes += (f"{file} is a checkpoint of OpenAI's: {architecture.name}, with QuickGELU",)
        self.metadata = SourceMetadata(
            file,
            file.parent,
            architecture,
            model.preprocess if model else None,
            said_by=said_by,
            notes=notes,
        )

    @property
    def content(self) -> Mapping[str, Any] | None:
        return self._tensors.content

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._tensors.shapes()

    def read(self, name: str) -> Tensor:
        return self._tensors.read(name)


def is_openclip_folder(folder: Path) -> bool:
    """Whether a folder says that it is OpenCLIP's: other names of weights are not its alone."""
    names = (OPENCLIP_CONFIG, *(name for name in _PREFERRED if name.startswith("open_clip")))
    return any((folder / name).is_file() for name in names)


def find_openclip_file(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The weights that open_clip's `local-dir:` takes from a folder, and what to tell of it.

    Raises:
        InputError: there are several, and none has a name that it prefers.
    """
    try:
        held = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None
    files = [f for f in held if f.suffix in _KINDS] or [f for f in held if f.suffix == ".pt"]
    preferred = [folder / name for name in _PREFERRED if folder / name in files]
    if not preferred and len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"{folder} holds {len(files)} checkpoints ({names}); name one of them")
    chosen = next(iter(preferred or files), None)
    others = [file.name for file in files if file != chosen]
    if not others:
        return chosen, ()
    return chosen, (f"{folder}: {chosen.name} is taken, not {', '.join(others[:5])}",)


def write_openclip(
    target: Path,
    weights: ModelWeights,
    preprocess: Mapping[str, Any],
    tokenizer: TokenizerFiles,
    precision: str = "fp32",
    also_bin: bool = False,
    card: str | None = None,
) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:TARGET")` and its
    `get_tokenizer` load. The logit parameters stay in fp32.

    preprocess: OpenCLIP's preprocess_cfg; also_bin: the pickled file, too; card: the model card.

    Raises:
        InputError: `target` is not a new or empty folder, or a weight does not fit the precision.
    """
    settings = {
        "model_cfg": tokenizer.named_in(_model_cfg(weights.architecture)),
        "preprocess_cfg": preprocess,
    }
    tokenizer_files = tokenizer.for_transformers()
    shapes = {p.name: p.shape for p in parameter_table(weights.architecture)}
    specs = {
        name: TensorSpec(written_dtype(name, precision), shapes[name])
        for name in weights.stored_names
    }
    with new_folder(target) as folder:
        (folder / OPENCLIP_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        tensors = (rounded(weights.read(name), name, precision) for name in specs)
        write_safetensors(folder / OPENCLIP_WEIGHTS[0], specs, tensors)
        if also_bin:
            # The file just written, mapped: torch.save wants all tensors at once.
            torch.save(load_file(folder / OPENCLIP_WEIGHTS[0]), folder / OPENCLIP_WEIGHTS[1])
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        for name, content in tokenizer_files.items():
            (folder / name).write_bytes(content)


def _model_cfg(architecture: Architecture) -> dict[str, Any]:
    """With the size of its pictures: without one, open_clip prepares them for 224 x 224 pixels,
    whatever the size of a trunk of timm."""
    height, width = architecture.vision.image_size
    vision = dict(architecture.json["vision_cfg"])
    vision.setdefault("image_size", height if height == width else [height, width])
    return architecture.json | {"vision_cfg": vision}
