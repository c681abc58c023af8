"""Scan many shards for their samples, in several processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from parallel_clip.data.index.index_folder import FolderIndex
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.processes import parallel_map
from parallel_clip.data.storage.progress import Print, show_progress
from parallel_clip.data.storage.shards import Scan, scan_headers
from parallel_clip.errors import InputError

FEW = 16  # shards that are scanned quicker than processes start, and again in no time


def scan_all(
    paths: Sequence[str],
    folders: Mapping[str, FolderIndex],
    faults: dict[str, str],
    say: Print,
    workers: int | None = None,
    *,
    keep_above: int | None = None,
) -> dict[str, int]:
    """Scan shards into the indexes of their folders; the samples of each that is whole, and why the
    others are not in `faults`, by path.

    keep_above: where there are more than so many, each is kept at once
    (`FolderIndex.keep_at_once`), so that whatever ends this process loses only those in hand.
    """
    workers = 1 if len(paths) <= FEW else workers or os.cpu_count() or 1
    used = [folders[parent] for parent in dict.fromkeys(parent_and_name(p)[0] for p in paths)]
    for folder in used if keep_above is not None and len(paths) > keep_above else ():
        folder.keep_at_once()
    counts = {}
    try:
        scans = parallel_map(_scan_or_error, paths, workers=workers)
        for path, scan in zip(paths, show_progress(scans, len(paths), "indexed", say), strict=True):
            if isinstance(scan, InputError):
                faults[path] = str(scan)
                continue
            if scan.note is not None:
                say(f"shard {path}: {scan.note}")
            folders[parent_and_name(path)[0]].add(scan.index)
            counts[path] = scan.index.samples
    finally:
        for folder in used:
            folder.close_journal()
    return counts


def _scan_or_error(path: str) -> Scan | InputError:
    try:
        scan = scan_headers(path)
    except InputError as error:
        return error
    return scan if scan.damage is None else InputError(scan.refusal())
