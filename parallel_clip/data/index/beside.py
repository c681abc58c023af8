"""The index that lies beside shards at an address: fetched once, and again where it has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from parallel_clip.data.index.index_file import IndexFile, entry_at, write_index
from parallel_clip.data.index.journal import locked
from parallel_clip.data.storage.addresses import RemoteStat, file_system, remote_stat, request
from parallel_clip.data.storage.progress import Print

INDEX_NAME = "shards.index"


def fetch(folder: str, place: Path, say: Print) -> None:
    """Copy the index beside the shards of `folder`, if there is one, to `place`, unless it is that
    which was copied before; say what differs. Shards that only the index at `place` has stay in
    it."""
    address = f"{folder}/{INDEX_NAME}"
    try:
        stat = remote_stat(address)
    except OSError:  # there is none, or the store hides it: the index is made here
        return
    if _noted(place) == stat:
        return
    try:
        with locked(place):
            if _noted(place) == stat:  # another process was quicker
                return
            before = _read(place)
            _download(address, place)
            now = _read(place)
            if before is not None and now is not None:
                _keep_others(before, now, place)
            _note_file(place).write_text(json.dumps(stat._asdict()))
    except OSError as error:
        say(f"{address} cannot be fetched: {error}")
        return
    if now is None:
        say(f"{address} is not readable: the index is made here")
    elif before is None:
        say(f"index of {len(now):,} shards fetched from {address}")
    else:
        say(f"{address} has changed and was fetched again: {_count_changes(before, now)}")


def modified(place: Path) -> float | None:
    """When the index that was copied to `place` was written, in seconds since 1970."""
    noted = _noted(place)
    return None if noted is None else noted.modified


def _download(address: str, place: Path) -> None:
    system, path = file_system(address)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        request(address, lambda: system.get_file(path, str(temporary)))
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _keep_others(before: IndexFile, now: IndexFile, place: Path) -> None:
    others = np.flatnonzero(now.rows(before.names) < 0)
    if len(others):
        entries = [entry_at(now, row) for row in range(len(now))]
        write_index(place, entries + [entry_at(before, int(row)) for row in others])


def _count_changes(before: IndexFile, now: IndexFile) -> str:
    rows = before.rows(now.names)
    known = rows >= 0
    other = int(np.sum(before.checksums[rows[known]] != now.checksums[known]))
    return f"{int(np.sum(~known)):,} shards are new in it, {other:,} are other ones"


def _noted(place: Path) -> RemoteStat | None:
    """What the index copied to `place` was when it was fetched."""
    try:
        return RemoteStat(**json.loads(_note_file(place).read_text())) if place.exists() else None
    except (OSError, ValueError, TypeError):
        return None


def _note_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.fetched.json")


def _read(place: Path) -> IndexFile | None:
    try:
        return IndexFile.read(place)
    except (OSError, ValueError):
        return None
