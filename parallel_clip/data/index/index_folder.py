"""What is known of the shards of one folder: from index files, and what was scanned since.

An index is `shards.index` beside the shards, or in the cache folder where theirs is not writable or
is an address.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parallel_clip.data.index.index_file import IndexFile, write_index
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import FileStat
from parallel_clip.data.storage.progress import Print
from parallel_clip.data.storage.remote import cache_folder, file_system, is_remote, with_retries
from parallel_clip.data.storage.shards import ShardIndex, scan_shard
from parallel_clip.errors import InputError

INDEX_NAME = "shards.index"
SIZES_NAME = "sizes.json"  # OpenCLIP's: the samples of each shard, by file name


class FolderIndex:
    def __init__(self, place: str, files: list[IndexFile]):
        self._place = place
        self._files = files
        self._scanned: dict[str, tuple[ShardIndex, int]] = {}  # with the time of change
        self._sizes: dict[str, int] | None = None

    @classmethod
    def load(cls, place: str, say: Print) -> FolderIndex:
        files = []
        _fetch_remote_index(place)
        for path in _index_files(place):
            if not path.is_file():
                continue
            try:
                files.append(IndexFile.read(path))
            except (OSError, ValueError) as error:
                say(f"the index {path} is not readable ({error}): made again")
        return cls(place, files)

    def known(self, paths: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        """(samples, bytes, time of change) of those of `paths` that an index has."""
        found: dict[str, tuple[int, int, int]] = {}
        names = np.array([os.fsencode(parent_and_name(path)[1]) for path in paths])
        for file in reversed(self._files):
            for path, row in zip(paths, file.rows(names).tolist(), strict=True):
                if row >= 0:
                    facts = file.samples[row], file.bytes[row], file.changed_ns[row]
                    found[path] = tuple(map(int, facts))
        return found

    def shard(self, path: str) -> ShardIndex:
        if path in self._scanned:
            return self._scanned[path][0]
        name = np.array([os.fsencode(parent_and_name(path)[1])])
        for file in self._files:
            row = int(file.rows(name)[0])
            if row >= 0:
                return file.shard(row, path)
        self.add(scan_shard(path), None)  # only its count was asked for before
        return self._scanned[path][0]

    def add(self, shard: ShardIndex, stamp: FileStat | None) -> None:
        self._scanned[shard.path] = shard, 0 if stamp is None else stamp.changed_ns

    def sizes_from_json(self) -> dict[str, int]:
        """The counts of a `sizes.json` beside the shards."""
        if self._sizes is None:
            self._sizes = {} if is_remote(self._place) else _read_sizes(Path(self._place))
        return self._sizes

    def save(self, say: Print) -> None:
        if not self._scanned:
            return
        entries = dict(self._scanned)
        for file in self._files:
            for row, name in enumerate(file.names.tolist()):
                path = _join(self._place, os.fsdecode(name))
                if path not in entries:
                    entries[path] = file.shard(row, path), int(file.changed_ns[row])
        shards, changed = zip(*entries.values(), strict=True)
        samples = sum(shard.samples for shard in shards)
        for path in _index_files(self._place):
            try:
                write_index(path, shards, changed)
                self._files, self._scanned = [IndexFile.read(path)], {}
            except OSError:
                continue
            say(f"index of {len(shards):,} shards, {samples:,} samples, written to {path}")
            return
        say(
            f"neither {self._place} nor the cache folder is writable: the index is not kept "
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


def _index_files(place: str) -> list[Path]:
    """Where the index of a folder may be, best first."""
    name = hashlib.sha256(os.path.abspath(place).encode()).hexdigest()[:16]
    if is_remote(place):
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        return [cache_folder() / f"{name}.index"]
    return [Path(place) / INDEX_NAME, cache_folder() / f"{name}.index"]


def _fetch_remote_index(place: str) -> None:
    """The `shards.index` that lies beside shards at an address, if there is one."""
    if not is_remote(place):
        return
    target = _index_files(place)[0]
    if target.is_file():
        return
    try:
        system, path = file_system(f"{place}/{INDEX_NAME}")
        if not with_retries(place, lambda: system.exists(path)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with_retries(place, lambda: system.get_file(path, str(temporary)))
        temporary.replace(target)
    except OSError:
        return  # it is made here instead


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if is_remote(place) else os.path.normpath(os.path.join(place, name))
