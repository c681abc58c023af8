"""The index of shards: how many samples each has and where they are, made once and kept for each
folder of shards (see `index_folder.py`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel_clip.data.index.index_folder import SIZES_NAME, FolderIndex
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import FileStat, expand_shards, require_files
from parallel_clip.data.storage.processes import parallel_map
from parallel_clip.data.storage.progress import Print, show_progress
from parallel_clip.data.storage.shards import ShardIndex, scan_shard
from parallel_clip.errors import InputError

_FEW = 16  # shards that are scanned quicker than processes start


@dataclass(frozen=True)
class ShardTable(Sequence[ShardIndex]):
    """The shards that patterns name, in their order. How many samples each has is at hand; where
    they are is looked up for a shard that is asked for."""

    paths: list[str]
    counts: np.ndarray  # int64 [shards]
    folders: dict[str, FolderIndex]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> ShardIndex:
        """Raises InputError where the index is damaged, or other than it was said to be."""
        path = self.paths[number]
        shard = self.folders[parent_and_name(path)[0]].shard(path)
        if shard.samples != self.counts[number]:
            raise InputError(_other_count(path, int(self.counts[number]), shard.samples))
        return shard

    @property
    def samples(self) -> int:
        return int(self.counts.sum())


def index_shards(
    patterns: str | Sequence[str],
    say: Print = print,
    *,
    check: bool = True,
    save: bool = True,
    renew: bool = False,
    counts_suffice: bool = False,
    workers: int | None = None,
) -> ShardTable:
    """The index of the shards that patterns name (see `expand_shards`), in their order.

    Shards that no saved index has are scanned, which is said, and the index is saved unless `save`
    is False. check: look whether all shards are there, of the size that their index says, and hold
    as many samples as a `sizes.json` beside them says; one process of a job does this for all.
    renew: scan shards again that have changed since they were indexed; otherwise a change of size
    is an error. counts_suffice: do not scan shards whose count a `sizes.json` tells.

    Raises:
        InputError: shards that are missing, empty, cut off or changed, each by name.
    """
    paths = expand_shards(patterns)
    named = list(dict.fromkeys(paths))
    stamps = require_files(named) if check else {}
    by_folder: dict[str, list[str]] = {}
    for path in named:
        by_folder.setdefault(parent_and_name(path)[0], []).append(path)
    folders = {place: FolderIndex.load(place, say) for place in by_folder}
    counts: dict[str, int] = {}
    todo = []
    for place, members in by_folder.items():
        folder = folders[place]
        known = folder.known(members)
        changed = _changed(members, known, stamps, renew)
        if changed and not renew:
            raise InputError(_changed_message(changed, known, stamps))
        told = folder.sizes_from_json() if check or counts_suffice else {}
        for path in members:
            if path in known and path not in changed:
                counts[path] = known[path][0]
            elif counts_suffice and parent_and_name(path)[1] in told:
                counts[path] = told[parent_and_name(path)[1]]
            else:
                todo.append(path)
    if todo:
        say(f"making the index of {len(todo):,} of {len(named):,} shards")
        for shard in _scan(todo, say, workers):
            folders[parent_and_name(shard.path)[0]].add(shard, stamps.get(shard.path))
            counts[shard.path] = shard.samples
    if check:
        for place, members in by_folder.items():
            _check_told_sizes(members, counts, folders[place].sizes_from_json())
    table = ShardTable(paths, np.array([counts[path] for path in paths], np.int64), folders)
    if save:
        save_index(table, say)
    return table


def load_saved_indexes(paths: Sequence[str], say: Print = print) -> dict[str, ShardIndex]:
    """What saved indexes know of these shards, whether it is so or not."""
    folders: dict[str, FolderIndex] = {}
    found = {}
    for path in paths:
        place = parent_and_name(path)[0]
        if place not in folders:
            folders[place] = FolderIndex.load(place, say)
        if folders[place].known([path]):
            found[path] = folders[place].shard(path)
    return found


def save_index(table: ShardTable, say: Print = print) -> None:
    """Keep what `index_shards` scanned and has not been kept yet."""
    for folder in table.folders.values():
        folder.save(say)


def _scan(paths: Sequence[str], say: Print, workers: int | None) -> list[ShardIndex]:
    found, errors = [], []
    workers = 1 if len(paths) <= _FEW else workers or os.cpu_count() or 1
    results = parallel_map(_scan_or_error, paths, workers, chunksize=4)
    for result in show_progress(results, len(paths), "indexed", say):
        (errors if isinstance(result, InputError) else found).append(result)
    if errors:
        more = [f"and {len(errors) - 5:,} shards more"] if len(errors) > 5 else []
        raise InputError("\n".join([*map(str, errors[:5]), *more]))
    return found


def _scan_or_error(path: str) -> ShardIndex | InputError:
    try:
        return scan_shard(path)
    except InputError as error:
        return error


def _changed(
    paths: Sequence[str],
    known: dict[str, tuple[int, int, int]],
    stamps: dict[str, FileStat],
    renew: bool,
) -> set[str]:
    """Which shards are not those that were indexed. The time of change tells only that one may not
    be: copying changes it too."""
    changed = set()
    for path in paths:
        stamp = stamps.get(path)
        if stamp is not None and path in known:
            _, size, time = known[path]
            if stamp.size != size or renew and stamp.changed_ns != time:
                changed.add(path)
    return changed


def _changed_message(
    changed: set[str], known: dict[str, tuple[int, int, int]], stamps: dict[str, FileStat]
) -> str:
    shown = [
        f"shard {path} has {stamps[path].size:,} bytes, but had {known[path][1]:,} when it "
        f"was indexed, with {known[path][0]:,} samples"
        for path in sorted(changed)[:5]
    ]
    more = [f"and {len(changed) - 5:,} shards more"] if len(changed) > 5 else []
    return "\n".join([*shown, *more]) + (
        "\nfetch what is not whole again; if the change is meant, renew the index: "
        f"parallel-clip data index {sorted(changed)[0]}"
    )


def _check_told_sizes(paths: Sequence[str], counts: dict[str, int], told: dict[str, int]) -> None:
    wrong = [
        path for path in paths if told.get(parent_and_name(path)[1], counts[path]) != counts[path]
    ]
    if wrong:
        named = [_other_count(p, told[parent_and_name(p)[1]], counts[p]) for p in wrong[:5]]
        raise InputError("\n".join(named))


def _other_count(path: str, told: int, found: int) -> str:
    return (
        f"shard {path} holds {found:,} samples, but {SIZES_NAME} beside it says {told:,}; fetch "
        f"the shard again, or correct or remove the {SIZES_NAME}"
    )
