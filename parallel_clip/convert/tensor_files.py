"""Files that hold a state dict: safetensors, what torch.save writes, and TorchScript archives.

Nothing in a file is run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel_clip.convert.torchscript import is_torchscript, read_torchscript
from parallel_clip.errors import InputError

# Under which a trainer keeps the state dict in a dict of more; open_clip_train's first.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


class TensorFile(Protocol):
    """The tensors of a file. content: what torch.load gives, None for other files."""

    content: Mapping[str, Any] | None

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor: ...


def open_tensor_file(file: Path) -> TensorFile:
    """Open a file by what it is, whatever it is called.

    Raises:
        InputError: it is none of these, is damaged, or holds no state dict.
    """
    if file.suffix == ".safetensors":
        return SafetensorsFile(file)
    try:
        scripted = is_torchscript(file)
        content = read_torchscript(file) if scripted else _load(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception:  # of a damaged file torch and pickle raise nearly anything
        raise InputError(
            f"{file} is no torch file of plain tensors; a damaged one has to be fetched again, and "
            "from one that holds more (code could be run by reading it) the state dict has to be "
            "saved alone, as .safetensors or with torch.save"
        ) from None
    return LoadedTensors(_find_state_dict(content, file), None if scripted else content)


class SafetensorsFile:
    content = None

    def __init__(self, file: Path):
        try:
            self._tensors = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is not a safetensors file, or not whole: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        file = self._tensors
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def read(self, name: str) -> Tensor:
        return self._tensors.get_tensor(name)


class LoadedTensors:
    def __init__(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any] | None):
        self.content = content
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _load(file: Path) -> Any:
    # Only torch's newer format, a zip, can be mapped into memory.
    mapped = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _find_state_dict(content: Any, file: Path) -> Mapping[str, Tensor]:
    """The state dict that is the content or is in it.

    Raises:
        InputError: there is none.
    """
    if _is_state_dict(content):
        return content
    if isinstance(content, Mapping):
        for key in _STATE_DICT_KEYS:
            if _is_state_dict(content.get(key)):
                return content[key]
        held = f": it has {', '.join(map(str, list(content)[:5]))}" if content else ""
    else:
        held = f": it is a {type(content).__name__}"
    raise InputError(f"{file} holds no state dict of tensors{held}")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
