"""The table of the shards that a pattern names: find them, check them against their index, and scan
those that have none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallel_clip.data.index.index_folder import FolderIndex
from parallel_clip.data.index.scan import scan_all
from parallel_clip.data.index.sidecars import SIZES_NAME, counts_of_img2dataset, read_sizes
from parallel_clip.data.storage.addresses import is_remote
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import (
    FileStat,
    expand_shards,
    missing_words,
    stat_files,
)
from parallel_clip.data.storage.progress import Print, print_nothing
from parallel_clip.data.storage.shards import ShardFiles, ShardIndex
from parallel_clip.errors import InputError

UNKNOWN = -1  # in place of a count: no saved index has the shard, and it has not been scanned


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
        return self._column("checksums")

    def bytes(self) -> np.ndarray:
        """The size of each shard, int64 [shards]; -1 where no index has it."""
        return self._column("bytes")

    def without(self, paths: Iterable[str]) -> ShardTable:
        """The table but for some shards."""
        gone = set(paths)
        kept = [number for number, path in enumerate(self.paths) if path not in gone]
        return replace(self, paths=[self.paths[n] for n in kept], counts=self.counts[kept])

    def rows_by_folder(self) -> Iterable[tuple[FolderIndex, list[int]]]:
        """Each folder with the numbers of its shards."""
        return [(self.folders[parent], numbers) for parent, numbers in self._numbers().items()]

    def _numbers(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for number, path in enumerate(self.paths):
            rows.setdefault(parent_and_name(path)[0], []).append(number)
        return rows

    def _column(self, name: str) -> np.ndarray:
        values = np.full(len(self), -1, np.int64)
        for folder, rows in self.rows_by_folder():
            values[rows] = getattr(folder.look_up([self.paths[row] for row in rows]), name)
        return values


def find_shards(
    patterns: str | Sequence[str],
    say: Print = print,
    folders: dict[str, FolderIndex] | None = None,
) -> ShardTable:
    """Expand patterns (see `expand_shards`) and read the saved indexes of their folders.

    Looks at no shard: a count is UNKNOWN where no index has it. folders: indexes that are open
    already, to which those of other folders are added. InputError: a pattern that names nothing.
    """
    return table_of(expand_shards(patterns), say, folders)


def table_of(
    paths: list[str], say: Print, folders: dict[str, FolderIndex] | None = None
) -> ShardTable:
    """`find_shards` for paths."""
    folders = {} if folders is None else folders
    _require_distinct(paths)
    for parent in dict.fromkeys(parent_and_name(path)[0] for path in paths):
        if parent not in folders:
            folders[parent] = FolderIndex.load(parent, say)
    table = ShardTable(paths, np.full(len(paths), UNKNOWN, np.int64), folders)
    for folder, rows in table.rows_by_folder():
        table.counts[rows] = folder.look_up([paths[row] for row in rows]).samples
    return table


def find_faults(table: ShardTable, *, local_only: bool = False) -> dict[str, str]:
    """What is wrong with shards, by path: they do not exist, or are not as they were when they were
    indexed.

    Looks at every shard, on this machine alone with `local_only`. One that has its size but another
    time of change may be a copy: its first and last sample are compared with the index. At an
    address an index that was made elsewhere has only sizes to compare.

    Raises:
        InputError: a store does not answer.
    """
    paths = [path for path in table.paths if not (local_only and is_remote(path))]
    faults: dict[str, str] = {}
    stats = stat_files(paths, faults)
    for path, stat in stats.items():
        if stat is None:
            faults.setdefault(path, f"shard {path} does not exist")
    files = ShardFiles()
    for folder, rows in table.rows_by_folder():
        indexed = folder.look_up([table.paths[row] for row in rows])
        for row, samples, size, changed in zip(
            rows, indexed.samples, indexed.bytes, indexed.changed, strict=True
        ):
            path = table.paths[row]
            stat = stats.get(path)
            if samples == UNKNOWN or stat is None:
                continue
            if stat.size != size:
                faults[path] = (
                    f"shard {path} has {stat.size:,} bytes, but had {size:,} when it was "
                    f"indexed, with {samples:,} samples"
                )
            elif _may_be_another(path, stat, int(changed), table, row, files):
                faults[path] = (
                    f"shard {path} is another one of as many bytes than when it was indexed, with "
                    f"{samples:,} samples"
                )
    files.close()
    return faults


def check_shards(table: ShardTable, *, local_only: bool = False) -> None:
    """Check that all shards exist and are as they were when they were indexed (`find_faults`), and
    have as many samples as a `sizes.json` beside them says.

    Raises:
        InputError: shards that are missing or changed, each by name.
    """
    faults = find_faults(table, local_only=local_only)
    if faults:
        raise InputError(describe_faults(faults, len(table)))
    _check_counts(table)


def describe_faults(faults: dict[str, str], total: int) -> str:
    """In words, with the way out. total: shards there are to be."""
    missing = [path for path, fault in faults.items() if fault.endswith("does not exist")]
    changed = sorted(path for path in faults if "was indexed" in faults[path])
    told = {*missing, *changed}
    others = [fault for path, fault in faults.items() if path not in told]
    parts = [missing_words(missing, total)] if missing else []
    if changed:
        parts += first_five([faults[path] for path in changed])
        parts.append(
            "fetch what is not whole again; if the change is meant, renew the index: "
            f"parallel-clip data index {changed[0]}"
        )
    return "\n".join([*parts, *first_five(others)])


def counts_from_sidecars(table: ShardTable) -> ShardTable:
    """The table with counts of a `sizes.json`, or of img2dataset's files, beside the shards where
    no index has them."""
    counts = table.counts.copy()
    for parent, rows in table._numbers().items():
        unknown = [row for row in rows if counts[row] == UNKNOWN]
        sizes = read_sizes(parent) if unknown else {}
        for row in unknown:
            counts[row] = sizes.get(parent_and_name(table.paths[row])[1], UNKNOWN)
        unknown = [row for row in unknown if counts[row] == UNKNOWN]
        found = counts_of_img2dataset(table.paths[row] for row in unknown)
        for row, count in zip(unknown, found, strict=True):
            counts[row] = count or UNKNOWN
    return replace(table, counts=counts)


def scan_unindexed(
    table: ShardTable,
    say: Print = print,
    workers: int | None = None,
    *,
    keep_above: int | None = None,
    bad: dict[str, str] | None = None,
) -> ShardTable:
    """The table with all counts known, after scanning the shards whose count is UNKNOWN.

    Scans in `workers` processes (None: one a core) and says so; `save_index` keeps what it finds.
    keep_above: where more shards than that are scanned, each is kept at once, so that the next scan
    goes on behind it. bad: takes those that are missing, empty or cut off, by path, with the
    reason; they stay UNKNOWN.

    Raises:
        InputError: such shards, each by name, where there is no `bad`; the others are scanned.
    """
    missing = list(
        dict.fromkeys(
            path for path, count in zip(table.paths, table.counts, strict=True) if count == UNKNOWN
        )
    )
    if not missing:
        return table
    say(f"making the index of {len(missing):,} of {len(set(table.paths)):,} shards")
    faults: dict[str, str] = {}
    found = scan_all(missing, table.folders, faults, say, workers, keep_above=keep_above)
    counts = [found.get(path, count) for path, count in zip(table.paths, table.counts, strict=True)]
    table = replace(table, counts=np.array(counts, np.int64))
    if faults and bad is None:
        raise InputError("\n".join(first_five(list(faults.values()))))
    _check_counts(table)
    if bad is not None:
        bad |= faults
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
    keep_above: int | None = None,
) -> ShardTable:
    """Find, check and scan: the table that the first process of a job opens.

    counts_suffice: do not scan those whose number of samples a file beside them has;
    keep_above: as in `scan_unindexed`.
    """
    table = find_shards(patterns, say, folders)
    return check_and_scan(table, say, counts_suffice=counts_suffice, keep_above=keep_above)


def check_and_scan(
    table: ShardTable, say: Print, *, counts_suffice: bool = False, keep_above: int | None = None
) -> ShardTable:
    """`find_checked_shards` for a table."""
    check_shards(table)  # before a scan that may take hours
    table = counts_from_sidecars(table) if counts_suffice else table
    return scan_unindexed(table, say, keep_above=keep_above)


def save_index(table: ShardTable, say: Print = print) -> None:
    """Write what was scanned and is not saved yet to the indexes of the table's folders."""
    for folder in table.folders.values():
        folder.save(say)


def first_five(lines: list[str]) -> list[str]:
    return lines[:5] + ([f"and {len(lines) - 5:,} shards more"] if len(lines) > 5 else [])


def _require_distinct(paths: Sequence[str]) -> None:
    """InputError: two addresses that are one shard to an index, and may be two."""
    known: dict[tuple[str, str], str] = {}
    for path in paths:
        other = known.setdefault(parent_and_name(path), path)
        if other != path:
            raise InputError(
                f"{other} and {path} are one shard but for what signs them; name it once"
            )


def _may_be_another(
    path: str, stat: FileStat, changed: int, table: ShardTable, row: int, files: ShardFiles
) -> bool:
    if stat.changed == changed or 0 in (stat.changed, changed):
        return False
    if is_remote(path):
        return changed < 0  # it was made there, so that ETag or time can be compared
    return not files.has_ends_of(table[row])


def _check_counts(table: ShardTable) -> None:
    """Compare the known counts with `sizes.json`. Raises InputError."""
    for parent, rows in table._numbers().items():
        sizes = read_sizes(parent)
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
