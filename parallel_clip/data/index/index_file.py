"""The file format of the index of a folder of shards: safetensors with a table of the shards and
where in them each sample is.

All shards: `names`, their file names in UTF-8, sorted, a line each. Each shard: `bytes`,
`changed_ns` (`ShardIndex.changed`), `samples`, and `checksums`, of its part of what follows. Each
sample, shard after shard: `bounds`, which are `ShardIndex.bounds` and one more for each shard, and
`headers`, which are `ShardIndex.checksums`.

The tables are read when the file is opened, `bounds` and `headers` for one shard at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from parallel_clip.data.storage.shards import ShardIndex
from parallel_clip.errors import InputError

FORMAT = "parallel_clip shard index 2"

_TABLES = {"bytes": np.int64, "changed_ns": np.int64, "samples": np.int64, "checksums": np.uint32}
_PARTS = {**_TABLES, "bounds": np.uint32, "headers": np.uint32, "names": np.uint8}  # in this order
_KINDS = {np.uint8: "U8", np.uint32: "U32", np.int64: "I64"}  # as safetensors names them


@dataclass(frozen=True)
class IndexTables:
    """What a file has on each of its shards, in memory. Rows are shards by name."""

    path: Path
    names: np.ndarray  # bytes [shards], sorted
    bytes: np.ndarray  # int64 [shards], and so the next two
    changed_ns: np.ndarray
    samples: np.ndarray
    checksums: np.ndarray  # uint32 [shards]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, names: np.ndarray) -> np.ndarray:
        """The row of each name (bytes [n]); -1 where there is none."""
        found = np.searchsorted(self.names, names)
        found[found == len(self)] = 0
        return np.where(self.names[found] == names, found, -1) if len(self) else found - 1

    def shard(self, row: int, path: str) -> ShardIndex:
        """The index of the shard in a row. InputError where the file is damaged there."""
        shard = self._read(row, path)
        if shard.table_checksum != self.checksums[row]:
            raise InputError(
                f"the index {self.path} is damaged where it tells of {path}; delete it, and run "
                "parallel-clip data index"
            )
        return shard

    def _read(self, row: int, path: str) -> ShardIndex:
        raise NotImplementedError


class IndexFile(IndexTables):
    """An open index file: tables in memory, bounds of samples on disk."""

    @classmethod
    def read(cls, path: Path) -> IndexFile:
        """Open a file. Raises ValueError if it is damaged or of another format, OSError."""
        try:
            file = safe_open(path, framework="numpy").__enter__()
            kind = (file.metadata() or {}).get("format")
            if kind != FORMAT:
                raise ValueError(f"its format is {kind!r}")
            text = file.get_tensor("names").tobytes()
            tables = {name: file.get_tensor(name) for name in _TABLES}
            shapes = {name: file.get_slice(name).get_shape() for name in ("bounds", "headers")}
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        names = np.array(text.split(b"\n") if text else [], dtype=bytes)
        counts = tables["samples"]
        lengths = {len(table) for table in tables.values()} | {len(names)}
        whole = (
            len(lengths) == 1
            and (counts > 0).all()
            and shapes == {"bounds": [counts.sum() + len(counts)], "headers": [counts.sum()]}
            and all(tables[name].dtype == kind for name, kind in _TABLES.items())
        )
        if not whole:
            raise ValueError("its parts do not fit one another")
        index = cls(path, names, **tables)
        index.__dict__["_file"] = file  # which others may replace: its tables are those of this one
        return index

    def _read(self, row: int, path: str) -> ShardIndex:
        first, count = int(self._starts[row]), int(self.samples[row])
        bounds = self._file.get_slice("bounds")[first + row : first + row + count + 1]
        headers = self._file.get_slice("headers")[first : first + count]
        return ShardIndex(path, int(self.bytes[row]), bounds, headers, int(self.changed_ns[row]))

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples)])

    @cached_property
    def _file(self):
        return safe_open(self.path, framework="numpy").__enter__()

    def __getstate__(self) -> dict:  # a file is opened anew in another process
        return {key: value for key, value in self.__dict__.items() if key != "_file"}


class IndexEntry(NamedTuple):
    """A shard to be written to an index: its file's name, its tables, and what reads the rest, so
    that an index larger than memory can be written."""

    name: bytes
    bytes: int
    changed_ns: int
    samples: int
    checksums: int
    read: Callable[[], ShardIndex]


def entry_of(shard: ShardIndex, name: bytes) -> IndexEntry:
    return IndexEntry(
        name, shard.bytes, shard.changed, shard.samples, shard.table_checksum, lambda: shard
    )


def entry_at(file: IndexTables, row: int) -> IndexEntry:
    """What a file has in a row; read from it when it is written to another."""
    name = file.names[row]
    return IndexEntry(
        name,
        int(file.bytes[row]),
        int(file.changed_ns[row]),
        int(file.samples[row]),
        int(file.checksums[row]),
        lambda: file.shard(row, os.fsdecode(name)),
    )


def write_index(path: Path, entries: Sequence[IndexEntry]) -> None:
    """Write the index of the shards of one folder, whole or not at all. Raises OSError.

    Written shard by shard; the bytes are those that safetensors' own writer would write.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    names = b"\n".join(entry.name for entry in entries)
    tables = {
        name: np.array([getattr(entry, name) for entry in entries], kind)
        for name, kind in _TABLES.items()
    }
    samples = int(tables["samples"].sum())
    lengths = dict.fromkeys(_TABLES, len(entries))
    lengths |= {"bounds": samples + len(entries), "headers": samples, "names": len(names)}
    header: dict[str, object] = {"__metadata__": {"format": FORMAT}}
    offset = 0
    for name, kind in _PARTS.items():
        end = offset + lengths[name] * np.dtype(kind).itemsize
        header[name] = {
            "dtype": _KINDS[kind],
            "shape": [lengths[name]],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for table in tables.values():
                stream.write(table.tobytes())
            for entry in entries:
                stream.write(np.ascontiguousarray(entry.read().bounds).tobytes())
            for entry in entries:
                stream.write(np.ascontiguousarray(entry.read().checksums).tobytes())
            stream.write(names)
        os.replace(temporary, path)
    except (OSError, InputError):
        temporary.unlink(missing_ok=True)
        raise
