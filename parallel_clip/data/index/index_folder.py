"""The index of one folder of shards: its saved files, and the shards scanned since.

It is saved as `shards.index` beside the shards, or in the cache folder where theirs is not writable
or is an address. While it is made, what has been scanned is kept in `shards.index.parts`
(`journal.py`), from where `save` takes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parallel_clip.data.index import beside
from parallel_clip.data.index.index_file import (
    IndexEntry,
    IndexFile,
    IndexTables,
    entry_at,
    entry_of,
    write_index,
)
from parallel_clip.data.index.journal import (
    Journal,
    JournalWriter,
    is_finished,
    journals_in,
    locked,
)
from parallel_clip.data.storage.addresses import is_remote
from parallel_clip.data.storage.disks import settings_folder
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.progress import Print, print_nothing
from parallel_clip.data.storage.shards import ShardIndex, scan_shard


class IndexedShards(NamedTuple):
    """What an index has on n shards, int64 [n] each; -1 for a shard that it does not have."""

    samples: np.ndarray
    bytes: np.ndarray
    changed: np.ndarray  # `ShardIndex.changed`
    checksums: np.ndarray  # `ShardIndex.table_checksum`


class FolderIndex:
    """The index of one folder of shards: rows of its saved files, and what was scanned since.

    A shard is looked up among the scanned ones first, then in the journals, the newest first, then
    in the file beside the shards, then in that of the cache folder. `save` merges all of them into
    one file.
    """

    def __init__(self, folder: str, places: Sequence[Path]):
        self._folder = folder
        self._places = places  # of the index, best first
        self._files: list[IndexTables] = []
        self._scanned: dict[str, ShardIndex] = {}  # by path
        self._keeps_at_once = False
        self._place = 0  # of the journal
        self._journal: JournalWriter | None = None
        self._own: set[Path] = set()  # journals that this one has closed
        self._has_news = False  # the journals have more than `_files`

    @classmethod
    def load(cls, folder: str, say: Print, place: Path | None = None) -> FolderIndex:
        """Read the saved files; one that is damaged is left out, which is said. One beside shards
        at an address is fetched where it is not the one that was fetched before.

        place: the index, where it is to be neither beside the shards nor in the cache folder.
        """
        places = [place] if place is not None else _usual_places(folder)
        if is_remote(folder) and place is None:
            beside.fetch(folder, places[0], say)
        index = cls(folder, places)
        index._read_files(say)
        return index

    @property
    def beside_modified(self) -> float | None:
        """When the index beside shards at an address was written; None where it is not known."""
        return beside.modified(self._places[0]) if is_remote(self._folder) else None

    def look_up(self, paths: Sequence[str]) -> IndexedShards:
        """What is known of shards of this folder."""
        self._read_news()
        table = np.full((len(IndexedShards._fields), len(paths)), -1, np.int64)
        names = np.array([_name(path) for path in paths])
        for file in reversed(self._files):
            rows = file.rows(names)
            has = rows >= 0
            columns = file.samples, file.bytes, file.changed_ns, file.checksums
            table[:, has] = [values[rows[has]] for values in columns]
        for number, path in enumerate(paths if self._scanned else ()):
            if path in self._scanned:
                shard = self._scanned[path]
                found = IndexedShards(
                    shard.samples, shard.bytes, shard.changed, shard.table_checksum
                )
                table[:, number] = found
        return IndexedShards(*table)

    def shard(self, path: str) -> ShardIndex:
        """The index of one shard; scanned where no file has it. Raises InputError."""
        self._read_news()
        if path not in self._scanned:
            name = np.array([_name(path)])
            for file in self._files:
                row = int(file.rows(name)[0])
                if row >= 0:
                    return file.shard(row, path)
            self._scanned[path] = scan_shard(path)  # its count came from a sidecar
        return self._scanned[path]

    def keep_at_once(self) -> None:
        """From now on, keep each shard that is added in a journal, where a place is writable, and
        not in memory."""
        self._keeps_at_once = True

    def add(self, shard: ShardIndex) -> None:
        """Take in a scanned shard; `save` keeps it."""
        if not self._keep(lambda journal: journal.append(_name(shard.path), shard)):
            self._scanned[shard.path] = shard

    def refuse(self, path: str) -> None:
        """Note a shard that cannot be used, where shards are kept at once."""
        self._keep(lambda journal: journal.refuse(_name(path)))

    def was_refused(self, path: str) -> bool:
        """Whether a journal notes that a shard cannot be used."""
        journals = (file for file in self._files if isinstance(file, Journal))
        return any(_name(path) in journal.refused for journal in journals)

    def close_journal(self) -> None:
        """What was added stays in the journal; others may take it into an index."""
        self._keeps_at_once = False
        if self._journal is not None:
            self._journal.close()
            self._own.add(self._journal.path)
            self._journal = None

    def save(self, say: Print) -> None:
        """Merge what was scanned, here and by others that left a journal, into the index beside the
        shards, else that in the cache folder; both may refuse. Others that save at the same time
        wait."""
        self.close_journal()
        self._read_news()
        if not self._scanned and not any(isinstance(file, Journal) for file in self._files):
            return
        for place in self._places:
            try:
                with locked(place):
                    shards, samples = self._merge(place)
            except OSError:
                continue
            if shards:
                say(f"index of {shards:,} shards, {samples:,} samples, written to {place}")
            return
        say(
            f"neither {self._folder} nor the cache folder is writable: the index is not kept "
            "(set PARALLEL_CLIP_CACHE to a folder that is)"
        )

    def _keep(self, write: Callable[[JournalWriter], None]) -> bool:
        """Write a record to the journal; where its disk is full, to one in the next place. False
        where none is to be kept, or can be."""
        while self._keeps_at_once:
            try:
                if self._journal is None:
                    self._journal = JournalWriter(_parts(self._places[self._place]))
                write(self._journal)
                self._has_news = True
                return True
            except OSError:
                if self._journal is not None:  # what it has is whole but for the last record
                    self._journal.close()
                    self._own.add(self._journal.path)
                    self._journal = None
                self._place += 1
                self._keeps_at_once = self._place < len(self._places)
        return False

    def _merge(self, place: Path) -> tuple[int, int]:
        """Shards and samples of the index that was written."""
        for left in place.parent.glob(f".{place.name}.*"):  # by one that was killed as it wrote
            if left.suffix != ".lock":
                left.unlink(missing_ok=True)
        # Found before they are read: one that ends meanwhile stays for the next.
        journals = [path for other in self._places for path in journals_in(_parts(other))]
        finished = [path for path in journals if path in self._own or is_finished(path)]
        self._read_files(print_nothing)  # others may have saved since
        entries: dict[bytes, IndexEntry] = {}
        for path, shard in self._scanned.items():
            entries[_name(path)] = entry_of(shard, _name(path))
        for file in self._files:
            for row, name in enumerate(file.names.tolist()):
                if name not in entries:
                    entries[name] = entry_at(file, row)
        if entries:
            write_index(place, list(entries.values()))
        for journal in finished:
            with suppress(OSError):  # a place that is not writable any more
                journal.unlink(missing_ok=True)
        for other in self._places:
            with suppress(OSError):
                _parts(other).rmdir()  # where it is empty
        self._scanned = {}
        self._read_files(print_nothing)
        return len(entries), sum(entry.samples for entry in entries.values())

    def _read_news(self) -> None:
        if self._has_news:
            self._read_files(print_nothing)
            self._has_news = False

    def _read_files(self, say: Print) -> None:
        self._files = []
        for place in self._places:
            found: list[tuple[Path, type[Journal] | type[IndexFile]]] = [
                (path, Journal) for path in reversed(journals_in(_parts(place)))
            ]
            found += [(place, IndexFile)] if place.is_file() else []
            for path, kind in found:
                try:
                    self._files.append(kind.read(path))
                except FileNotFoundError:  # another process has merged it
                    continue
                except (OSError, ValueError) as error:
                    say(f"the index {path} is not readable ({error}): made again")


def _name(path: str) -> bytes:
    return os.fsencode(parent_and_name(path)[1])


def _usual_places(folder: str) -> list[Path]:
    """Where the index of a folder may be, best first."""
    where = folder if is_remote(folder) else os.path.abspath(folder)
    name = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    cached = settings_folder() / f"{name}.index"
    return [cached] if is_remote(folder) else [Path(folder) / beside.INDEX_NAME, cached]


def _parts(place: Path) -> Path:
    return place.with_name(f"{place.name}.parts")
