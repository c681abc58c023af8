"""Files that hold a state dict: safetensors, what torch.save writes, and TorchScript archives.

Nothing in a file is run.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel_clip.convert.plain_tensors import check_plain, is_tensor
from parallel_clip.convert.torchscript import is_torchscript, read_torchscript
from parallel_clip.errors import InputError

# Under which a trainer keeps the state dict in a dict of more; open_clip_train's first.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
_MAPPED_BYTES = 64 << 20


class TensorFile(Protocol):
    """The tensors of a file. content: what torch.load gives, None for other files."""

    content: Mapping[str, Any] | None

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> Tensor:
        """InputError: it cannot be taken for weights, see plain_tensors.py."""


def open_tensor_file(file: Path) -> TensorFile:
    """Open a file by what it is, whatever it is called.

    Raises:
        InputError: it is none of these, is damaged, or holds no state dict.
    """
    return SafetensorsFile(file) if file.suffix == ".safetensors" else TorchFile(file)


class SafetensorsFile:
    """A tensor that is read lies in the file, which is mapped as long as the tensor lives."""

    content = None

    def __init__(self, file: Path):
        self._file = file
        with self._opened() as opened:
            self._shapes = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        # Opened each time: of one mapping all that was read would count as this process's memory.
        with self._opened() as opened:
            tensor = opened.get_tensor(name)
        check_plain(tensor, f"{name} in {self._file}")
        return tensor

    @contextmanager
    def _opened(self) -> Iterator[safe_open]:
        try:
            with safe_open(self._file, framework="pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self._file} is not a safetensors file, or not whole: {error}"
            ) from None


class TorchFile:
    """What torch.save writes, or a TorchScript archive. Only the newer format of torch.save is
    mapped, and mapped anew after `_MAPPED_BYTES`; others are in memory as a whole."""

    def __init__(self, file: Path):
        self._file = file
        self._open()

    @property
    def content(self) -> Mapping[str, Any] | None:
        return self._content

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        if self._is_mapped and self._bytes > _MAPPED_BYTES:
            self._open()
        tensor = self._tensors[name]
        check_plain(tensor, f"{name} in {self._file}")
        self._bytes += tensor.nbytes
        return tensor

    def _open(self) -> None:
        self._content, self._tensors, self._bytes = None, {}, 0  # the mapping before goes first
        try:
            scripted = is_torchscript(self._file)
            self._is_mapped = not scripted and zipfile.is_zipfile(self._file)
            content = read_torchscript(self._file) if scripted else self._load()
        except OSError as error:
            raise InputError(f"{self._file} cannot be read: {error.strerror or error}") from None
        except Exception:  # of a damaged file torch and pickle raise nearly anything
            raise InputError(
                f"{self._file} is no torch file of plain tensors; a damaged one has to be fetched "
                "again, and from one that holds more (code could be run by reading it) the state "
                "dict has to be saved alone, as .safetensors or with torch.save"
            ) from None
        self._tensors = _find_state_dict(content, self._file)
        self._content = None if scripted else content

    def _load(self) -> Any:
        return torch.load(self._file, map_location="cpu", weights_only=True, mmap=self._is_mapped)


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
        and all(isinstance(k, str) and is_tensor(v) for k, v in value.items())
    )
