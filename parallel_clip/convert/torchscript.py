"""The tensors of a TorchScript archive, such as OpenAI's CLIP releases, without running its code.

An archive is a zip file: `data.pkl` pickles the tree of modules, whose tensors name records of
bytes in `data/`; the modules' code is in `code/` and not looked at. The pickle is read with a
loader that knows the few globals that the trees of modules are made of, and refuses any other.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """The archive's tensors by their names in a state dict.

    Raises:
        pickle.UnpicklingError, zipfile.BadZipFile and others: the archive is damaged, or holds what
            is no tree of modules.
    """
    with zipfile.ZipFile(file) as archive:
        root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix(
            "data.pkl"
        )
        with archive.open(f"{root}data.pkl") as pickled:
            module = _TreeReader(pickled, archive, root).load()
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    return tensors


class _Module:
    """Stands for a module of the archive, of whatever class."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


def _collect(module: _Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    for name, value in module.state.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors)


def _view(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """In the place of torch._utils._rebuild_tensor_v2; storage: all its values, in a row."""
    return storage.as_strided(size, stride, offset)


def _as_is(value: Any, *_: object) -> Any:
    return value


_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.jit._pickle", "restore_type_tag"): _as_is,
    **{("torch.jit._pickle", f"build_{kind}list"): _as_is for kind in ("int", "double", "bool")},
    ("torch.jit._pickle", "build_tensorlist"): _as_is,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _TreeReader(pickle.Unpickler):
    def __init__(self, pickled: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(pickled)
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a model") from None

    def persistent_load(self, identity: tuple) -> Tensor:
        """A storage: ("storage", its dtype, its record, a device, how many values)."""
        _, dtype, key, _, count = identity
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{key}"))  # checks its CRC
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)
            self._storages[key] = values[:count]
        return self._storages[key]
