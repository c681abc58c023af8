"""Write safetensors files tensor by tensor: no more than one tensor is in memory.

The library's own writer takes all tensors of a file at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.pieces import safetensors_header

_BLOCK_BYTES = 4 << 20


class TensorSpec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterator[Tensor]
) -> None:
    """Write a new file, flushed to the disk.

    specs: dtype and shape of each tensor by its name; tensors: their values on the CPU, in this
    order, taken from the iterator one at a time; it may give more than `specs` has.
    """
    blocks = (block for spec in specs.values() for block in _blocks(_next(tensors, spec)))
    durable.write_new(path, chain([safetensors_header(specs)], blocks))


def _next(tensors: Iterator[Tensor], spec: TensorSpec) -> Tensor:
    tensor = next(tensors)
    if (tensor.dtype, tuple(tensor.shape)) != spec:
        raise ValueError(f"a tensor is {tensor.dtype} {list(tensor.shape)}, announced as {spec}")
    return tensor


def _blocks(tensor: Tensor) -> Iterator[bytes]:
    """The tensor's bytes. Copies, so that whoever holds the last block holds no tensor."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    del tensor
    for start in range(0, content.size, _BLOCK_BYTES):
        yield content[start : start + _BLOCK_BYTES].tobytes()
