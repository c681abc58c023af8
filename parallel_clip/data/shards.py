"""WebDataset shards: which files a pattern names, and the samples inside one.

A sample is a run of files with one key: the path up to the first dot of the file's name. The rest
of the name, in lower case, says what the file is: `jpg`, `txt`, `json`, `cls`, ...
"""

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from parallel_clip.data.tar import Read, TarError, members
from parallel_clip.errors import InputError

MAX_SAMPLE_BYTES = 128 * 2**20  # of all files of a sample together
OPEN_SHARDS = 128  # per process: the order reads from as many places at a time

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


class BadSampleError(Exception):
    """A sample cannot be used; `key` is empty where not even that could be read."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are: sample i is bytes [bounds[i], bounds[i + 1])."""

    path: Path
    bounds: np.ndarray  # int64 [samples + 1]

    @property
    def samples(self) -> int:
        return len(self.bounds) - 1


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in its shard: the contents of its files by extension."""

    key: str
    files: dict[str, bytes]


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """The shard files that patterns name, in order.

    A pattern is a file, a folder (all its `.tar`), or has braces (`{000..099}`, `{a,b}`) or
    wildcards; several stand in a list or in one text with `::` between them. InputError names
    missing files.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    paths = [path for text in patterns for part in text.split("::") for path in _expand(part)]
    if not paths:
        raise InputError("no shards are named; give files, folders or patterns of .tar files")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        named = ", ".join(missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise InputError(
            f"{len(missing):,} of {len(paths):,} shards do not exist: {named}{more}; correct the "
            f"pattern {'::'.join(patterns)!r} (paths start from {os.getcwd()})"
        )
    return paths


def split_name(name: str) -> tuple[str, str] | None:
    """A member's (key, extension); None for a file of no sample (hidden, `__meta__`, no dot)."""
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def scan_shard(path: Path) -> ShardIndex:
    """Find the samples of a shard by reading its headers; InputError if it is cut off or empty."""
    bounds, last_key, end = [], None, 0
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise TarError("it is empty (0 bytes)")
            if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
                raise TarError("it is compressed; shards are read in place, so gunzip it")
            for member in members(_reader(file.fileno()), size):
                name = split_name(member.name)
                if name is None:
                    continue
                if name[0] != last_key:
                    bounds.append(member.header)
                    last_key = name[0]
                end = member.end
        if not bounds:
            raise TarError("it holds no samples (no file named KEY.EXTENSION)")
    except OSError as error:
        raise InputError(f"shard {path} cannot be read: {error.strerror}") from error
    except TarError as error:
        raise InputError(
            f"shard {path} is not whole: {error}; fetch or write it again, or leave it out"
        ) from None
    return ShardIndex(path, np.array([*bounds, end], np.int64))


class ShardFiles:
    """Reads samples, keeping the shards last read from open."""

    def __init__(self, limit: int = OPEN_SHARDS):
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, shard: ShardIndex, index: int) -> StoredSample:
        """Sample `index` of a shard, by one read.

        Raises BadSampleError if the sample is damaged or larger than MAX_SAMPLE_BYTES, OSError if
        the file system fails: a sample is bad only for what it is, or runs would differ by chance.
        """
        start, end = int(shard.bounds[index]), int(shard.bounds[index + 1])
        file = self._file(shard.path)
        if not 0 < end - start <= MAX_SAMPLE_BYTES:
            reason = f"{end - start:,} bytes, at most {MAX_SAMPLE_BYTES:,} are read"
            raise BadSampleError(_first_key(file, start, end), reason)
        data = os.pread(file, end - start, start)
        key, files = "", {}
        try:
            for member in members(_slicer(data), len(data), end_mark=False):
                name = split_name(member.name)
                if name is None:
                    continue
                key = name[0]
                if name[1] in files:
                    raise TarError(f"two files .{name[1]}")
                files[name[1]] = data[member.offset : member.offset + member.size]
            if len(data) < end - start:
                raise TarError("the shard has become shorter since it was indexed")
        except TarError as error:
            raise BadSampleError(key, f"damaged in the shard: {error}") from None
        return StoredSample(key, files)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __getstate__(self) -> dict:
        return {"_limit": self._limit, "_open": OrderedDict()}


def _expand(pattern: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(
            f"{pattern!r} is not a path: shards are read from file systems; mount or copy them"
        )
    try:
        texts = list(braceexpand(pattern)) if pattern else []
    except UnbalancedBracesError:
        raise InputError(f"unbalanced braces in the shard pattern {pattern!r}") from None
    paths: list[Path] = []
    for text in texts:
        if os.path.isdir(text):
            found = sorted(Path(text).glob("*.tar"))
            if not found:
                raise InputError(f"the folder {text} holds no .tar files")
            paths += found
        elif not os.path.exists(text) and glob.has_magic(text):
            found = sorted(glob.glob(text))
            if not found:
                raise InputError(f"no shards match {text!r} (paths start from {os.getcwd()})")
            paths += map(Path, found)
        else:
            paths.append(Path(text))
    return paths


def _first_key(file: int, start: int, end: int) -> str:
    try:
        first = next(members(_reader(file, start), end - start, end_mark=False))
    except (TarError, StopIteration):
        return ""
    return (split_name(first.name) or ("",))[0]


def _reader(file: int, start: int = 0) -> Read:
    return lambda size, offset: os.pread(file, size, start + offset)


def _slicer(data: bytes) -> Read:
    return lambda size, offset: data[offset : offset + size]
