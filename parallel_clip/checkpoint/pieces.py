"""The files of one checkpoint: tensors cut into pieces along an axis, and how to read any range.

Knows nothing of models or ranks. Tensors are named `KIND:NAME`, KIND one of `KINDS`, or `AVERAGE`
where averages are kept.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.durable import FileRecord
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.errors import InputError
from parallel_clip.optimizer import MOMENTS

KINDS = ("weight", *MOMENTS)
INDEX_FILE = "index.json"
PIECE_SUFFIX = ".safetensors"
FILE_BYTES = 128 << 20  # a writer holds so much, and as much again that is being written
_COPY_BYTES = 4 << 20  # that a reader copies at once
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Piece(NamedTuple):
    """A part of the tensor `key`, of full `shape`: `values` begin at `start` on `axis`.

    values: on the CPU and contiguous; not to be changed before they are written (`host_copy`).
    """

    key: str
    values: Tensor
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0


def host_copy(values: Tensor) -> Tensor:
    """A contiguous copy on the CPU, also of a view or tensor that lies there already."""
    return values.detach().to("cpu", copy=True).contiguous()


class WrittenPieces(NamedTuple):
    """What one rank has written: a row of the index for each piece, and a record of each file."""

    entries: list[dict]
    files: dict[str, FileRecord]


def write_pieces(
    folder: Path, rank: int, pieces: Iterable[Piece], file_bytes: int | None = None
) -> WrittenPieces:
    """Write one rank's pieces to files of about `file_bytes` (None: `FILE_BYTES`). Uses no
    collective of its own.

    A file is written and flushed on a thread while the pieces of the next one are collected.
    """
    entries: list[dict] = []
    files: dict[str, Future[FileRecord]] = {}
    pending: dict[str, Tensor] = {}
    with ThreadPoolExecutor(1) as writer:

        def write_pending(file: str) -> None:
            for before in files.values():
                before.result()  # no more than one waits: memory is bounded
            files[file] = writer.submit(write_tensor_file, folder / file, pending)

        for piece in pieces:
            file = f"rank_{rank:05d}_{len(files):03d}{PIECE_SUFFIX}"
            stored = f"{piece.key}@{piece.start}"
            pending[stored] = piece.values
            entries.append(
                {"key": piece.key, "shape": list(piece.shape), "axis": piece.axis,
                 "start": piece.start, "stored": stored, "file": file}
            )  # fmt: skip
            if sum(tensor.nbytes for tensor in pending.values()) >= (file_bytes or FILE_BYTES):
                write_pending(file)
                pending = {}
        if pending:
            write_pending(file)
        return WrittenPieces(entries, {name: record.result() for name, record in files.items()})


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write fp32 tensors, on the CPU and contiguous, as a safetensors file. The library's own
    writer neither flushes nor hashes."""
    header = safetensors_header(
        {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    )
    contents = (tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values())
    return durable.write_new(path, chain([header], contents))


def safetensors_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with, given the dtype and shape of each tensor; behind it come
    their bytes in this order: a JSON header behind its length (8 bytes, little-endian), see
    https://github.com/huggingface/safetensors, "Format"."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entry = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, entries: Iterable[dict]) -> FileRecord:
    """Write `index.json` from the rows that `write_pieces` returned on all ranks."""
    tensors: dict[str, dict] = {}
    for entry in entries:
        tensor = tensors.setdefault(
            entry["key"], {"shape": entry["shape"], "axis": entry["axis"], "pieces": []}
        )
        tensor["pieces"].append({k: entry[k] for k in ("start", "file", "stored")})
    return durable.write_new(folder / INDEX_FILE, [json.dumps(tensors, indent=1).encode()])


class PieceReader:
    """Reads whole tensors, or ranges of them, from a checkpoint written in any layout.

    The manifest and the index are verified, the tensors are not (`Manifest.verify` does). Raises
    InputError, here and in its methods, where the checkpoint is not whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, safe_open] = {}
        Manifest.read(folder).verify(folder, [INDEX_FILE])
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
            self._tensors = {key: _Tensor.from_json(value) for key, value in index.items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{folder} is not a whole checkpoint: {INDEX_FILE}: {error!r}; use another one"
            ) from None

    def close_files(self) -> None:
        """Let go of the files, which `read` opens again: what was read of an open one counts as
        this process's memory."""
        self._open.clear()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensor(key).shape

    def read(self, key: str) -> Tensor:
        """The full tensor: fp32 on the CPU."""
        shape = self.shape(key)
        if shape:
            return self.read_range(key, 0, 0, shape[0])
        (piece,) = self._tensor(key).pieces
        with self._reading(piece.file) as file:
            return file.get_tensor(piece.stored).float()

    def read_range(self, key: str, axis: int, start: int, length: int) -> Tensor:
        """`length` entries of the tensor from `start` along `axis`: fp32 on the CPU.

        Only the bytes that overlap are read.
        """
        tensor = self._tensor(key)
        shape = list(tensor.shape)
        shape[axis] = length
        result = torch.empty(shape)
        read = 0
        for piece in tensor.pieces:
            with self._reading(piece.file) as file:
                read += _copy_overlap(
                    file.get_slice(piece.stored), tensor.axis, piece.start, axis, start, result
                )
        if read != result.numel():
            raise InputError(
                f"{self.folder}: {key} has {read} of the {result.numel()} numbers asked of it; "
                "the checkpoint is damaged, use another one"
            )
        return result

    def _tensor(self, key: str) -> _Tensor:
        if key not in self._tensors:
            raise InputError(
                f"{self.folder} is not a whole checkpoint: {INDEX_FILE} has no {key}; "
                "use another one"
            )
        return self._tensors[key]

    @contextmanager
    def _reading(self, name: str) -> Iterator[safe_open]:
        """The open file; whatever is wrong with it or its tensors is an InputError."""
        try:
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            yield self._open[name]
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{self.folder / name} cannot be read ({error}); the checkpoint is not whole, "
                "use another one"
            ) from None


@dataclass(frozen=True)
class _Piece:
    start: int
    file: str
    stored: str


@dataclass(frozen=True)
class _Tensor:
    """A line of the index: a tensor's full shape, the axis that it is cut along, its pieces."""

    shape: tuple[int, ...]
    axis: int
    pieces: list[_Piece]

    @classmethod
    def from_json(cls, values: dict) -> _Tensor:
        pieces = [_Piece(**piece) for piece in values["pieces"]]
        for piece in pieces:
            if Path(piece.file).name != piece.file:
                raise ValueError(f"{piece.file} is not a file of the checkpoint")
        return cls(tuple(values["shape"]), values["axis"], pieces)


def _copy_overlap(
    stored, cut_axis: int, cut_start: int, axis: int, start: int, result: Tensor
) -> int:
    """Copy what a piece shares with the range into `result`; returns how many numbers.

    stored: the piece, which begins at `cut_start` on `cut_axis` of the full tensor.
    """
    extent = stored.get_shape()
    window = [slice(0, size) for size in extent]  # of the piece
    target = [slice(0, size) for size in extent]  # of the result
    target[cut_axis] = slice(cut_start, cut_start + extent[cut_axis])
    whole_start = target[axis].start
    first = max(start, whole_start)
    last = min(start + result.shape[axis], whole_start + extent[axis])
    if first >= last:
        return 0
    window[axis] = slice(first - whole_start, last - whole_start)
    target[axis] = slice(first - start, last - start)
    rows = window[0].stop - window[0].start
    into = result[tuple(target)]
    step = max(1, _COPY_BYTES * rows // max(1, into.nbytes))
    for row in range(0, rows, step):  # by parts: a slice is a copy
        part = slice(window[0].start + row, min(window[0].start + row + step, window[0].stop))
        into[row : row + step] = stored[(part, *window[1:])]
    return into.numel()
