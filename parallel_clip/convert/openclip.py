"""OpenCLIP's checkpoints: its folder or one of its files as a source, and writing its folder."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel_clip.convert.weight_source import ModelWeights, SourceMetadata, make_empty_folder
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OpenClipSource:
    """An OpenCLIP state dict in safetensors or as torch saves it, with its config if beside it.

    A pickled file is read with `weights_only=True`: nothing in it is run.
    """

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
        self.metadata = SourceMetadata(architecture, preprocess, tokenizer=None, folder=file.parent)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._file.suffix == ".safetensors":
            file = self._safetensors
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
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


def write_openclip(
    target: Path,
    weights: ModelWeights,
    preprocess: dict,
    precision: str = "fp32",
    also_bin: bool = False,
) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:TARGET")` loads.

    preprocess: OpenCLIP's preprocess_cfg; also_bin: the pickled file, too. InputError: `target` is
    not a new or empty folder.
    """
    dtype = PRECISIONS[precision]
    # Read before anything is written: the source may be damaged.
    state = {name: tensor.to(dtype) for name, tensor in weights.read_all().items()}
    make_empty_folder(target)
    settings = {"model_cfg": weights.architecture.json, "preprocess_cfg": preprocess}
    (target / OPENCLIP_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    _save_safetensors(state, target / OPENCLIP_WEIGHTS[0])
    if also_bin:
        torch.save(state, target / OPENCLIP_WEIGHTS[1])


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the process's default permissions (the library's are 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
