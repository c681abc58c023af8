"""The index of one folder of shards: its saved files, and the shards scanned since.

It is saved as `shards.index` beside the shards, or in the cache folder where theirs is not writable
or is an address.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel_clip.data.index.index_file import IndexFile, write_index
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.progress import Print
from parallel_clip.data.storage.remote import cache_folder, file_system, is_remote, with_retries
from parallel_clip.data.storage.shards import ShardIndex, scan_shard
from parallel_clip.errors import InputError

INDEX_NAME = "shards.index"
SIZES_NAME = "sizes.json"  # OpenCLIP's: the samples of each shard, by file name


class IndexedShards(NamedTuple):
    """What an index has on n shards, int64 [n] each; -1 for a shard that it does not have."""

    samples: np.ndarray
    bytes: np.ndarray
    changed_ns: np.ndarray  # time of change
    checksums: np.ndarray  # `ShardIndex.table_checksum`


class FolderIndex:
    """The index of one folder of shards: rows of its saved files, and what was scanned since.

    A shard is looked up among the scanned ones first, then in the file beside the shards, then in
    that of the cache folder. `save` merges all of them into one file.
    """

    def __init__(self, folder: str, files: list[IndexFile]):
        self._folder = folder
        self._files = files
        self._scanned: dict[str, tuple[ShardIndex, int]] = {}  # by path, with the time of change
        self._sizes: dict[str, int] | None = None

    @classmethod
    def load(cls, folder: str, say: Print) -> FolderIndex:
        """Read the saved files; one that is damaged is left out, which is said."""
        files = []
        _fetch_remote_index(folder)
        for path in filter(Path.is_file, _index_files(folder)):
            try:
                files.append(IndexFile.read(path))
            except (OSError, ValueError) as error:
                say(f"the index {path} is not readable ({error}): made again")
        return cls(folder, files)

    def look_up(self, paths: Sequence[str]) -> IndexedShards:
        """What is known of shards of this folder."""
        table = np.full((len(IndexedShards._fields), len(paths)), -1, np.int64)
        names = np.array([os.fsencode(parent_and_name(path)[1]) for path in paths])
        for file in reversed(self._files):
            rows = file.rows(names)
            has = rows >= 0
            columns = file.samples, file.bytes, file.changed_ns, file.checksums
            table[:, has] = [values[rows[has]] for values in columns]
        for number, path in enumerate(paths if self._scanned else ()):
            if path in self._scanned:
                shard, changed_ns = self._scanned[path]
                found = IndexedShards(shard.samples, shard.bytes, changed_ns, shard.table_checksum)
                table[:, number] = found
        return IndexedShards(*table)

    def shard(self, path: str) -> ShardIndex:
        """The index of one shard; scanned where no file has it. Raises InputError."""
        if path in self._scanned:
            return self._scanned[path][0]
        name = np.array([os.fsencode(parent_and_name(path)[1])])
        for file in self._files:
            row = int(file.rows(name)[0])
            if row >= 0:
                return file.shard(row, path)
        self.add(scan_shard(path), 0)  # its count came from sizes.json
        return self._scanned[path][0]

    def add(self, shard: ShardIndex, changed_ns: int) -> None:
        """Take in a scanned shard; `save` keeps it."""
        self._scanned[shard.path] = shard, changed_ns

    def sizes_from_json(self) -> dict[str, int]:
        """The counts of a `sizes.json` beside the shards, by file name; InputError: damaged."""
        if self._sizes is None:
            self._sizes = {} if is_remote(self._folder) else _read_sizes(Path(self._folder))
        return self._sizes

    def save(self, say: Print) -> None:
        """Write what was scanned beside the shards, else to the cache folder; both may refuse."""
        if not self._scanned:
            return
        entries = dict(self._scanned)
        for file in self._files:
            for row, name in enumerate(file.names.tolist()):
                path = _join(self._folder, os.fsdecode(name))
                if path not in entries:
                    entries[path] = file.shard(row, path), int(file.changed_ns[row])
        shards, changed = zip(*entries.values(), strict=True)
        samples = sum(shard.samples for shard in shards)
        for path in _index_files(self._folder):
            try:
                write_index(path, shards, changed)
                self._files, self._scanned = [IndexFile.read(path)], {}
            except OSError:
                continue
            say(f"index of {len(shards):,} shards, {samples:,} samples, written to {path}")
            return
        say(
            f"neither {self._folder} nor the cache folder is writable: the index is not kept "
            "(set PARALLEL_CLIP_CACHE to a folder that is)"
        )


def _read_sizes(folder: Path) -> dict[str, int]:
    file = folder / SIZES_NAME
    if not file.is_file():
        return {}
    try:
        sizes = json.loads(file.read_text())
        return {str(name): int(count) for name, count in sizes.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a table of counts by shard: {error}") from None


def _index_files(folder: str) -> list[Path]:
    """The files that may hold the index of a folder, best first."""
    place = folder if is_remote(folder) else os.path.abspath(folder)
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    cached = cache_folder() / f"{name}.index"
    return [cached] if is_remote(folder) else [Path(folder) / INDEX_NAME, cached]


def _fetch_remote_index(folder: str) -> None:
    """Copy the `shards.index` beside shards at an address, if there is one, to the cache folder."""
    target = _index_files(folder)[0]
    if not is_remote(folder) or target.is_file():
        return
    with suppress(OSError):  # it is made here instead
        system, path = file_system(f"{folder}/{INDEX_NAME}")
        if not with_retries(folder, lambda: system.exists(path)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with_retries(folder, lambda: system.get_file(path, str(temporary)))
        temporary.replace(target)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if is_remote(folder) else os.path.normpath(os.path.join(folder, name))
