"""The table of the shards that a pattern names: find them, check them, scan those without an index,
and save the index of each folder (see `index_folder.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallel_clip.data.index.index_folder import SIZES_NAME, FolderIndex
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import expand_shards, file_stat, require_files
from parallel_clip.data.storage.processes import parallel_map
from parallel_clip.data.storage.progress import Print, print_nothing, show_progress
from parallel_clip.data.storage.shards import ShardIndex, scan_shard
from parallel_clip.errors import InputError

UNKNOWN = -1  # in place of a count: no saved index has the shard, and it has not been scanned

_FEW = 16  # shards that are scanned quicker than processes start


@dataclass(frozen=True)
class ShardTable(Sequence[ShardIndex]):
    """The shards that patterns name, in their order, with the number of samples of each.

    `table[i]` reads where the samples of shard i are, from the index or by scanning it.
    """

    paths: list[str]
    counts: np.ndarray  # int64 [shards], samples of each or UNKNOWN
    folders: dict[str, FolderIndex]  # by folder; tables of one run share them

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> ShardIndex:
        """Raises InputError where the index is damaged, or the count is not what was said."""
        path = self.paths[number]
        shard = self.folders[parent_and_name(path)[0]].shard(path)
        if shard.samples != self.counts[number]:
            raise InputError(_count_mismatch(path, int(self.counts[number]), shard.samples))
        return shard

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def table_checksums(self) -> np.ndarray:
        """`ShardIndex.table_checksum` of each shard, int64 [shards]; -1 where no index has it."""
        checksums = np.full(len(self), -1, np.int64)
        for folder, rows in self.rows_by_folder():
            checksums[rows] = folder.look_up([self.paths[row] for row in rows]).checksums
        return checksums

    def rows_by_folder(self) -> Iterable[tuple[FolderIndex, list[int]]]:
        """Each folder with the numbers of its shards."""
        rows: dict[str, list[int]] = {}
        for number, path in enumerate(self.paths):
            rows.setdefault(parent_and_name(path)[0], []).append(number)
        return [(self.folders[parent], numbers) for parent, numbers in rows.items()]


def find_shards(
    patterns: str | Sequence[str],
    say: Print = print,
    folders: dict[str, FolderIndex] | None = None,
) -> ShardTable:
    """Expand patterns (see `expand_shards`) and read the saved indexes of their folders.

    Looks at no shard: a count is UNKNOWN where no index has it. folders: indexes that are open
    already, to which those of other folders are added. InputError: a pattern that names nothing.
    """
    paths = expand_shards(patterns)
    folders = {} if folders is None else folders
    for parent in dict.fromkeys(parent_and_name(path)[0] for path in paths):
        if parent not in folders:
            folders[parent] = FolderIndex.load(parent, say)
    table = ShardTable(paths, np.full(len(paths), UNKNOWN, np.int64), folders)
    for folder, rows in table.rows_by_folder():
        table.counts[rows] = folder.look_up([paths[row] for row in rows]).samples
    return table


def check_shards(table: ShardTable) -> None:
    """Check that all shards exist, have the size of which their index says that they had, and as
    many samples as a `sizes.json` beside them says.

    Looks at every shard on this machine; one process of a job does this on each.

    Raises:
        InputError: shards that are missing or changed, each by name.
    """
    stats = require_files(list(dict.fromkeys(table.paths)))
    for folder, rows in table.rows_by_folder():
        paths = [table.paths[row] for row in rows]
        indexed = folder.look_up(paths)
        # Size alone: copying changes the time of change too.
        changed = {
            path: f"shard {path} has {stats[path].size:,} bytes, but had {size:,} when it was "
            f"indexed, with {samples:,} samples"
            for path, samples, size in zip(paths, indexed.samples, indexed.bytes, strict=True)
            if samples != UNKNOWN and path in stats and stats[path].size != size
        }
        if changed:
            raise InputError(
                "\n".join(_first_five([changed[path] for path in sorted(changed)]))
                + "\nfetch what is not whole again; if the change is meant, renew the index: "
                f"parallel-clip data index {min(changed)}"
            )
    _check_counts(table)


def counts_from_json(table: ShardTable) -> ShardTable:
    """The table with counts of a `sizes.json` beside the shards where no index has them."""
    counts = table.counts.copy()
    for folder, rows in table.rows_by_folder():
        sizes = folder.sizes_from_json()
        for row in rows:
            if counts[row] == UNKNOWN:
                counts[row] = sizes.get(parent_and_name(table.paths[row])[1], UNKNOWN)
    return replace(table, counts=counts)


def scan_unindexed(table: ShardTable, say: Print = print, workers: int | None = None) -> ShardTable:
    """The table with all counts known, after scanning the shards whose count is UNKNOWN.

    Scans in `workers` processes (None: one a core) and says so; `save_index` keeps what it finds.

    Raises:
        InputError: shards that are missing, empty or cut off, each by name.
    """
    missing = dict.fromkeys(
        path for path, count in zip(table.paths, table.counts, strict=True) if count == UNKNOWN
    )
    if not missing:
        return table
    say(f"making the index of {len(missing):,} of {len(set(table.paths)):,} shards")
    found = {}
    for shard, changed_ns in _scan(list(missing), say, workers):
        table.folders[parent_and_name(shard.path)[0]].add(shard, changed_ns)
        found[shard.path] = shard.samples
    counts = [found.get(path, count) for path, count in zip(table.paths, table.counts, strict=True)]
    table = replace(table, counts=np.array(counts, np.int64))
    _check_counts(table)
    return table


def open_shards(
    patterns: str | Sequence[str], folders: dict[str, FolderIndex] | None = None
) -> ShardTable:
    """The table that the other processes of a job open, once the first has checked the shards and
    saved their index. Prints nothing; scans only where no index could be saved."""
    return scan_unindexed(find_shards(patterns, print_nothing, folders), print_nothing)


def find_checked_shards(
    patterns: str | Sequence[str],
    say: Print = print,
    folders: dict[str, FolderIndex] | None = None,
    *,
    counts_suffice: bool = False,
) -> ShardTable:
    """Find, check and scan: the table that the first process of a job opens.

    counts_suffice: do not scan those whose number of samples a `sizes.json` beside them has.
    """
    table = find_shards(patterns, say, folders)
    check_shards(table)  # before a scan that may take hours
    return scan_unindexed(counts_from_json(table) if counts_suffice else table, say)


def save_index(table: ShardTable, say: Print = print) -> None:
    """Write what was scanned and is not saved yet to the indexes of the table's folders."""
    for folder in table.folders.values():
        folder.save(say)


def renew_index(
    patterns: str | Sequence[str], say: Print = print, workers: int | None = None
) -> ShardTable:
    """Scan the shards that are new or have changed (size or time of change), and save the index.

    Raises:
        InputError: shards that are missing, empty, cut off, or disagree with a `sizes.json`.
    """
    table = find_shards(patterns, say)
    stats = require_files(list(dict.fromkeys(table.paths)))
    for folder, rows in table.rows_by_folder():
        folder.sizes_from_json()  # found unreadable before a scan
        indexed = folder.look_up([table.paths[row] for row in rows])
        for row, *saved in zip(rows, indexed.bytes, indexed.changed_ns, strict=True):
            stat = stats.get(table.paths[row])
            if stat is not None and tuple(saved) != stat:
                table.counts[row] = UNKNOWN
    table = scan_unindexed(table, say, workers)
    _check_counts(table)
    save_index(table, say)
    return table


def _scan(paths: Sequence[str], say: Print, workers: int | None) -> list[tuple[ShardIndex, int]]:
    """Each shard's index and time of change (ns)."""
    found, errors = [], []
    workers = 1 if len(paths) <= _FEW else workers or os.cpu_count() or 1
    results = parallel_map(_scan_or_error, paths, workers=workers, chunksize=4)
    for result in show_progress(results, len(paths), "indexed", say):
        (errors if isinstance(result, InputError) else found).append(result)
    if errors:
        raise InputError("\n".join(_first_five(list(map(str, errors)))))
    return found


def _scan_or_error(path: str) -> tuple[ShardIndex, int] | InputError:
    stat = file_stat(path)  # before: a change meanwhile is noticed when the index is renewed
    try:
        return scan_shard(path), 0 if stat is None else stat.changed_ns
    except InputError as error:
        return error


def _first_five(lines: list[str]) -> list[str]:
    return lines[:5] + ([f"and {len(lines) - 5:,} shards more"] if len(lines) > 5 else [])


def _check_counts(table: ShardTable) -> None:
    """Compare the known counts with `sizes.json`. Raises InputError."""
    for folder, rows in table.rows_by_folder():
        sizes = folder.sizes_from_json()
        wrong = []
        for row in rows if sizes else ():
            path, count = table.paths[row], int(table.counts[row])
            expected = sizes.get(parent_and_name(path)[1], count)
            if count not in (UNKNOWN, expected):
                wrong.append(_count_mismatch(path, expected, count))
        if wrong:
            raise InputError("\n".join(wrong[:5]))


def _count_mismatch(path: str, expected: int, found: int) -> str:
    return (
        f"shard {path} holds {found:,} samples, but {SIZES_NAME} beside it says {expected:,}; "
        f"fetch the shard again, or correct or remove the {SIZES_NAME}"
    )
