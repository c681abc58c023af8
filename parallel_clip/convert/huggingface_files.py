"""The weights in a Hugging Face folder: one file, or shards that an index lists."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_clip.convert.tensor_files import TensorFile, open_tensor_file
from parallel_clip.convert.tensor_fit import some_names
from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# In transformers' order.
_FILES = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# What else a folder may hold, and why it is not read.
_OTHERS = {
    "*-of-*.safetensors": f"shards without {WEIGHTS_INDEX}, which lists them",
    "*-of-*.bin": "shards without pytorch_model.bin.index.json, which lists them",
    "*.h5": "weights of TensorFlow",
    "*.msgpack": "weights of Flax",
    "adapter_*": "an adapter, not a model",
    "*.gguf": "weights of llama.cpp",
}


def find_weights(folder: Path) -> Path:
    """The file of weights, or the index of its shards, that transformers would take.

    Raises:
        InputError: there is none.
    """
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    held = next((what for pattern, what in _OTHERS.items() if any(folder.glob(pattern))), None)
    raise InputError(
        f"{folder} has a config.json and none of {', '.join(_FILES)}"
        f"{f'; it holds {held}' if held else ''}; bring the weights that belong to it"
    )


def open_weights(file: Path) -> TensorFile:
    """Open a file of weights, or the shards of an index.

    Raises:
        InputError: it is damaged or not whole.
    """
    return ShardedFile(file) if file.name.endswith(".index.json") else open_tensor_file(file)


class ShardedFile:
    """The tensors of all shards. One shard is open at a time."""

    content: Mapping[str, Any] | None = None

    def __init__(self, index: Path):
        self._folder = index.parent
        self._shard_of = _read_index(index)
        shards = sorted({*self._shard_of.values()})
        missing = [shard for shard in shards if not os.path.isfile(self._folder / shard)]
        if missing:
            raise InputError(
                f"{index} lists {len(shards)} shards, of which {len(missing)} are not there "
                f"({some_names(missing)}): half a checkpoint; bring the others"
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in shards:
            shapes = open_tensor_file(self._folder / shard).shapes()
            for name, shape in shapes.items():
                if self._shard_of.setdefault(name, shard) == shard:
                    self._shapes[name] = shape
        lost = sorted(self._shard_of.keys() - self._shapes.keys())
        if lost:
            raise InputError(
                f"{index} says that {lost[0]} is in {self._shard_of[lost[0]]}, and it is not "
                f"({len(lost):,} such tensors): the shards are of another checkpoint, or damaged"
            )
        self._open: tuple[str, TensorFile] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        shard = self._shard_of[name]
        if self._open is None or self._open[0] != shard:
            self._open = None  # the one before is let go of first
            self._open = shard, open_tensor_file(self._folder / shard)
        return self._open[1].read(name)


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        InputError: the index is damaged, or names a file outside of its folder.
    """
    shards = read_json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index} is no index of shards: it has no weight_map, or an empty one")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index} is no index of shards: {shard!r} is no file of its folder")
    return shards
