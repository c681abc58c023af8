"""The index of shards: how many samples each has and where they are, kept in a file.

One file for a folder of shards, `shards.index` beside them, or in the cache folder where theirs is
not writable (`$PARALLEL_CLIP_CACHE`, else `~/.cache/parallel_clip`). It is one line of JSON, then
the samples' bounds of all shards as little-endian int64, mapped into memory and so shared by all
processes of a machine. A shard whose size or time of change differs is scanned again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from parallel_clip.data.shards import ShardIndex, expand_shards, scan_shard
from parallel_clip.errors import InputError

INDEX_NAME = "shards.index"

_FORMAT = "parallel_clip shard index 1"
_THREADS = 8  # scanning waits for the file system, not for the processor
_SECONDS_BETWEEN_REPORTS = 10
_MAX_HEADER_BYTES = 2**28

Say = Callable[[str], None]


def index_shards(
    patterns: str | Sequence[str], say: Say = print, *, save: bool = True
) -> list[ShardIndex]:
    """The index of the shards that patterns name (see `expand_shards`), in their order.

    What a saved index does not have is scanned, said, and saved unless `save` is False. Of several
    processes let one go first: the others then find all of it. InputError names every shard that is
    missing, empty or cut off.
    """
    paths = expand_shards(patterns)
    folders = sorted({path.parent for path in paths})
    found = {folder: _load(folder, say) for folder in folders}
    todo = sorted({path for path in paths if path.name not in found[path.parent]})
    if todo:
        say(f"making the index of {len(todo):,} of {len(set(paths)):,} shards")
        scanned = _scan(todo, say)
        for index in scanned:
            found[index.path.parent][index.path.name] = index
        if save:
            save_index(scanned, say)
    return [found[path.parent][path.name] for path in paths]


def save_index(shards: Sequence[ShardIndex], say: Say = print) -> None:
    """Keep what `index_shards` found with `save=False`, where it is not kept already."""
    by_folder: dict[Path, dict[str, ShardIndex]] = {}
    for shard in shards:
        by_folder.setdefault(shard.path.parent, {})[shard.path.name] = shard
    for folder, found in sorted(by_folder.items()):
        saved = _load(folder, _say_nothing)
        if found.keys() - saved.keys():
            say(_save(folder, saved | found))


def _scan(paths: Sequence[Path], say: Say) -> list[ShardIndex]:
    found, errors, last_report = [], [], time.monotonic()
    with ThreadPoolExecutor(_THREADS) as threads:
        for number, result in enumerate(threads.map(_scan_or_error, paths), 1):
            (errors if isinstance(result, InputError) else found).append(result)
            if time.monotonic() - last_report > _SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                say(f"indexed {number:,} of {len(paths):,} shards")
    if errors:
        more = [f"and {len(errors) - 5:,} shards more"] if len(errors) > 5 else []
        raise InputError("\n".join([*map(str, errors[:5]), *more]))
    return found


def _scan_or_error(path: Path) -> ShardIndex | InputError:
    try:
        return scan_shard(path)
    except InputError as error:
        return error


def _load(folder: Path, say: Say) -> dict[str, ShardIndex]:
    """What is saved of the shards of a folder and still fits them, by file name."""
    found: dict[str, ShardIndex] = {}
    for file in _index_files(folder):
        if not file.is_file():
            continue
        try:
            entries = _read(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"the index {file} is not readable ({error}): made again")
            continue
        fits = {
            name: ShardIndex(folder / name, bounds)
            for name, stamp, bounds in entries
            if name not in found and stamp == _stamp(folder / name)
        }
        changed = [name for name, _, _ in entries if name not in fits and name not in found]
        if changed:
            say(
                f"the index {file} does not fit {len(changed):,} shards any more: {changed[0]}, ..."
            )
        found |= fits
    return found


def _read(file: Path) -> list[tuple[str, tuple[int, int], np.ndarray]]:
    """[(name, (bytes, time of change), bounds)] of the shards in an index file."""
    with open(file, "rb") as stream:
        line = stream.readline(_MAX_HEADER_BYTES)
    header = json.loads(line)
    if header["format"] != _FORMAT:
        raise ValueError(f"its format is {header['format']!r}")
    lengths = [entry["samples"] + 1 for entry in header["shards"]]
    if min(lengths, default=0) < 2 or os.path.getsize(file) != len(line) + 8 * sum(lengths):
        raise ValueError("it is cut off")
    bounds = np.memmap(file, "<i8", "r", offset=len(line), shape=(sum(lengths),))
    parts = np.split(bounds, np.cumsum(lengths)[:-1])
    return [
        (entry["name"], (entry["bytes"], entry["changed_ns"]), part)
        for entry, part in zip(header["shards"], parts, strict=True)
    ]


def _save(folder: Path, indexes: dict[str, ShardIndex]) -> str:
    """Write the index beside the shards or in the cache folder; returns what to tell of it."""
    shards = [indexes[name] for name in sorted(indexes)]
    entries = []
    for shard in shards:
        size, changed = _stamp(shard.path)
        entries.append(
            {
                "name": shard.path.name,
                "bytes": size,
                "changed_ns": changed,
                "samples": shard.samples,
            }
        )
    header = json.dumps({"format": _FORMAT, "shards": entries}).encode()
    header += b" " * (-(len(header) + 1) % 8) + b"\n"
    for file in _index_files(folder):
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as stream:
                stream.write(header)
                for shard in shards:
                    stream.write(shard.bounds.astype("<i8").tobytes())
            os.replace(temporary, file)
        except OSError:
            temporary.unlink(missing_ok=True)
            continue
        samples = sum(shard.samples for shard in shards)
        return f"index of {len(shards):,} shards, {samples:,} samples, written to {file}"
    return (
        f"neither {folder} nor the cache folder is writable: the index is not kept "
        "(set PARALLEL_CLIP_CACHE to a folder that is)"
    )


def _index_files(folder: Path) -> list[Path]:
    """Where the index of a folder may be, best first."""
    cache = os.environ.get("PARALLEL_CLIP_CACHE")
    if not cache:
        home = os.path.expanduser("~")
        if home == "~":  # a user without a home folder
            return [folder / INDEX_NAME]
        cache = os.path.join(home, ".cache", "parallel_clip")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / INDEX_NAME, Path(cache) / f"{name}.index"]


def _say_nothing(_: str) -> None:
    pass


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
