"""The file format of the index of a folder of shards: safetensors with a table of the shards and
where in them each sample is.

All shards: `names`, their file names in UTF-8, sorted, a line each. Each shard: `bytes`,
`changed_ns` (its time of change), `samples`, and `checksums`, of its part of what follows. Each
sample, shard after shard: `bounds`, which are `ShardIndex.bounds` and one more for each shard, and
`headers`, which are `ShardIndex.checksums`.

The tables are read when the file is opened, `bounds` and `headers` for one shard at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from parallel_clip.data.storage.shards import ShardIndex
from parallel_clip.errors import InputError

FORMAT = "parallel_clip shard index 2"

_TABLES = {"bytes": np.int64, "changed_ns": np.int64, "samples": np.int64, "checksums": np.uint32}
_PARTS = {**_TABLES, "bounds": np.uint32, "headers": np.uint32, "names": np.uint8}  # in this order
_KINDS = {np.uint8: "U8", np.uint32: "U32", np.int64: "I64"}  # as safetensors names them


@dataclass(frozen=True)
class IndexFile:
    """An open index file: tables in memory, bounds of samples on disk. Rows are shards by name."""

    path: Path
    names: np.ndarray  # bytes [shards], sorted
    bytes: np.ndarray  # int64 [shards], and so the next two
    changed_ns: np.ndarray
    samples: np.ndarray
    checksums: np.ndarray  # uint32 [shards]

    @classmethod
    def read(cls, path: Path) -> IndexFile:
        """Open a file. Raises ValueError if it is damaged or of another format, OSError."""
        try:
            with safe_open(path, framework="numpy") as file:
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
        return cls(path, names, **tables)

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, names: np.ndarray) -> np.ndarray:
        """The row of each name (bytes [n]); -1 where there is none."""
        found = np.searchsorted(self.names, names)
        found[found == len(self)] = 0
        return np.where(self.names[found] == names, found, -1) if len(self) else found - 1

    def shard(self, row: int, path: str) -> ShardIndex:
        """The index of the shard in a row. InputError where the file is damaged there."""
        first, count = int(self._starts[row]), int(self.samples[row])
        bounds = self._file.get_slice("bounds")[first + row : first + row + count + 1]
        headers = self._file.get_slice("headers")[first : first + count]
        shard = ShardIndex(path, int(self.bytes[row]), bounds, headers)
        if shard.table_checksum != self.checksums[row]:
            raise InputError(
                f"the index {self.path} is damaged where it tells of {path}; delete it, and run "
                "parallel-clip data index"
            )
        return shard

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples)])

    @cached_property
    def _file(self):
        return safe_open(self.path, framework="numpy").__enter__()

    def __getstate__(self) -> dict:  # a file is opened anew in another process
        return {key: value for key, value in self.__dict__.items() if key != "_file"}


def write_index(path: Path, shards: Sequence[ShardIndex], changed_ns: Sequence[int]) -> None:
    """Write the index of the shards of one folder, whole or not at all. Raises OSError.

    changed_ns: time of change of each shard. Written array by array, which needs no second copy of
    them in memory; the bytes are those that safetensors' own writer would write.
    """
    names = [os.fsencode(os.path.basename(shard.path)) for shard in shards]
    by_name = sorted(range(len(shards)), key=names.__getitem__)
    shards = [shards[number] for number in by_name]
    tables = {
        "bytes": [shard.bytes for shard in shards],
        "changed_ns": [changed_ns[number] for number in by_name],
        "samples": [shard.samples for shard in shards],
        "checksums": [shard.table_checksum for shard in shards],
    }
    parts = {name: [np.array(tables[name], kind)] for name, kind in _TABLES.items()}
    parts["bounds"] = [shard.bounds for shard in shards]
    parts["headers"] = [shard.checksums for shard in shards]
    parts["names"] = [np.frombuffer(b"\n".join(sorted(names)), np.uint8)]
    header: dict[str, object] = {"__metadata__": {"format": FORMAT}}
    offset = 0
    for name, arrays in parts.items():
        end = offset + sum(array.nbytes for array in arrays)
        length = sum(len(array) for array in arrays)
        kind = _KINDS[_PARTS[name]]
        header[name] = {"dtype": kind, "shape": [length], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for arrays in parts.values():
                for array in arrays:
                    stream.write(np.ascontiguousarray(array).tobytes())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
