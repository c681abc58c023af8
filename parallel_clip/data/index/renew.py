"""Make or renew the index of shards: `data index`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.index_folder import FolderIndex
from parallel_clip.data.index.shard_table import (
    UNKNOWN,
    ShardTable,
    first_five,
    save_index,
    scan_unindexed,
    table_of,
)
from parallel_clip.data.index.sidecars import read_sizes
from parallel_clip.data.storage.addresses import is_remote, remote_stat
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import FileStat, expand_shards, stat_files
from parallel_clip.data.storage.progress import Print
from parallel_clip.data.storage.shards import ShardFiles
from parallel_clip.errors import InputError


class Part(NamedTuple):
    """One of several parts of the work: `number` counts from 1."""

    number: int
    parts: int


def renew_index(
    patterns: str | Sequence[str],
    say: Print = print,
    workers: int | None = None,
    *,
    part: Part | None = None,
    merge: bool = False,
    out: Path | None = None,
) -> ShardTable:
    """Scan the shards that are new or have changed (size; time of change or ETag), and save the
    index. What has been scanned is kept at once; whatever ends this, the same call goes on.

    part: scan this part of the shards only, and leave what is found for `merge`, which scans
    only what parts have refused and saves the index of all. out: a folder for the index, instead of
    that of the shards.

    Raises:
        InputError: shards that are missing, empty, cut off, or disagree with a `sizes.json`; the
            index of the others is saved. With `merge`, that parts are missing.
    """
    paths = list(dict.fromkeys(expand_shards(patterns)))
    folders: dict[str, FolderIndex] = {}
    if out is not None:
        folders = _folder_elsewhere(paths, out, say)
    table = table_of(paths, say, folders)
    if part is not None:
        others = [path for n, path in enumerate(paths) if n % part.parts != part.number - 1]
        table = table.without(others)
        say(f"part {part.number} of {part.parts}: {len(table):,} of {len(paths):,} shards")
    total = len(table)
    bad: dict[str, str] = {}
    stats = stat_files(table.paths, bad)
    for path, stat in stats.items():
        if stat is None:
            bad.setdefault(path, f"shard {path} does not exist")
    table = table.without(bad)
    changed = _forget_changed(table, stats)
    if changed:
        say("changed since indexed: " + "; ".join(first_five(changed)))
    if merge:
        _require_looked_at(table, total)  # what a part refused is looked at once more
    table = scan_unindexed(table, say, workers, keep_above=0, bad=bad)
    if part is None:
        save_index(table, say)
    else:
        _note_refused(table, bad)
    if bad:
        raise InputError(
            f"{len(bad):,} of {total:,} shards cannot be used; the index has the other "
            f"{total - len(bad):,}:\n"
            + "\n".join(first_five(list(bad.values())))
            + "\nfetch them again, or train without them (data.missing=skip, data.exclude)"
        )
    return table


def _forget_changed(table: ShardTable, stats: dict[str, FileStat | None]) -> list[str]:
    """Make the counts UNKNOWN of shards that are not as they were indexed; the shards' names."""
    changed, files = [], ShardFiles()
    for parent in table._numbers():
        read_sizes(parent)  # found unreadable before a scan
    for folder, rows in table.rows_by_folder():
        indexed = folder.look_up([table.paths[row] for row in rows])
        for row, size, at in zip(rows, indexed.bytes, indexed.changed, strict=True):
            path, stat = table.paths[row], stats[table.paths[row]]
            if table.counts[row] == UNKNOWN or stat is None:
                continue
            same = size == stat.size and stat.changed == at
            if is_remote(path) and at > 0:  # indexed where it was made
                same = size == stat.size and not _is_newer(path, folder)
            elif same and not is_remote(path):  # two reads, for what has another's time
                same = files.has_ends_of(table[row])
            if not same:
                table.counts[row] = UNKNOWN
                changed.append(path)
    files.close()
    return changed


def _is_newer(path: str, folder: FolderIndex) -> bool:
    """Whether a shard at an address was written after the index beside it."""
    index, shard = folder.beside_modified, remote_stat(path).modified
    return index is not None and shard is not None and shard > index


def _require_looked_at(table: ShardTable, total: int) -> None:
    """InputError: shards that are in no part, neither indexed nor refused."""
    missing = [
        table.paths[row]
        for folder, rows in table.rows_by_folder()
        for row in rows
        if table.counts[row] == UNKNOWN and not folder.was_refused(table.paths[row])
    ]
    if missing:
        raise InputError(
            f"{len(missing):,} of {total:,} shards are in no part yet, {missing[0]} the first of "
            "them; run parallel-clip data index --part K/N for each K from 1 to N, then --merge"
        )


def _note_refused(table: ShardTable, bad: dict[str, str]) -> None:
    for folder, rows in table.rows_by_folder():
        refused = [table.paths[row] for row in rows if table.paths[row] in bad]
        folder.keep_at_once()
        for path in refused:
            folder.refuse(path)
        folder.close_journal()


def _folder_elsewhere(paths: Sequence[str], out: Path, say: Print) -> dict[str, FolderIndex]:
    parents = list(dict.fromkeys(parent_and_name(path)[0] for path in paths))
    if len(parents) > 1:
        raise InputError(
            f"--out takes the index of one folder, and these shards are in {len(parents):,}: "
            f"{', '.join(parents[:3])}; index each by itself"
        )
    return {parents[0]: FolderIndex.load(parents[0], say, out / INDEX_NAME)}
