"""Expand shard patterns (files, folders, braces, wildcards, addresses) and look at the files."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from parallel_clip.data.storage.remote import file_system, is_remote, with_retries
from parallel_clip.errors import InputError

_THREADS, _PART = 16, 512
# What fsspec's chained addresses begin with: simplecache::https://..., zip://a.tar::https://...
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
_ARCHIVES = ("zip://", "tar://", "libarchive://")


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """The paths of the shards that patterns name, in order, whether they exist or not.

    A pattern is a file, a folder (all its `.tar`), or has braces (`{000..099}`, `{a,b}`) or
    wildcards, on this machine or at an address such as s3://bucket/{00..99}.tar; several stand in a
    list or in one text with `::` between them. InputError: a pattern that names nothing.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    for text in patterns:
        _refuse_chains(text)
    paths = [path for text in patterns for part in text.split("::") for path in _expand(part)]
    if not paths:
        raise InputError("no shards are named; give files, folders or patterns of .tar files")
    return paths


class FileStat(NamedTuple):
    """A file's bytes, and its time of change in ns."""

    size: int
    changed_ns: int


def require_files(paths: Sequence[str]) -> dict[str, FileStat]:
    """The `FileStat` of each path on this machine, addresses left out; InputError names the
    missing."""
    local = list(dict.fromkeys(path for path in paths if not is_remote(path)))
    parts = [local[start : start + _PART] for start in range(0, len(local), _PART)]
    with ThreadPoolExecutor(_THREADS) as threads:  # it waits for the file system
        answers = threads.map(lambda part: [file_stat(path) for path in part], parts)
        found = dict(zip(local, chain.from_iterable(answers), strict=True))
    missing = [path for path, status in found.items() if status is None]
    if missing:
        shown = ", ".join(missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise InputError(
            f"{len(missing):,} of {len(paths):,} shards do not exist: {shown}{more}; correct the "
            f"pattern (paths start from {os.getcwd()})"
        )
    return found


def file_stat(path: str) -> FileStat | None:
    """None where there is no file of this machine."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileStat(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _refuse_chains(text: str) -> None:
    if any(part in _CACHES or part.startswith(_ARCHIVES) for part in text.split("::")):
        raise InputError(
            f"{text!r}: fsspec's chained addresses are not taken; write the address of the shards "
            "alone: they are cached anyway (data.cache), and read only where they lie as files"
        )


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise InputError(
            f"{pattern!r}: commands are not run; name files, folders, or addresses such as "
            "https:// and s3://"
        )
    try:
        texts = list(braceexpand(pattern)) if pattern else []
    except UnbalancedBracesError:
        raise InputError(f"unbalanced braces in the shard pattern {pattern!r}") from None
    if texts and is_remote(texts[0]):
        file_system(texts[0])  # is there one for this kind of address?
    return [path for text in texts for path in (_remote if is_remote(text) else _local)(text)]


def _local(text: str) -> list[str]:
    if text.endswith(".tar") and not glob.has_magic(text):
        return [os.path.normpath(text)]  # thousands of these, on file systems that answer slowly
    if os.path.isdir(text):
        found = sorted(glob.glob(os.path.join(glob.escape(text), "*.tar")))
        if not found:
            raise InputError(f"the folder {text} holds no .tar files")
    elif not os.path.exists(text) and glob.has_magic(text):
        found = sorted(glob.glob(text))
        if not found:
            raise InputError(f"no shards match {text!r} (paths start from {os.getcwd()})")
    else:
        found = [text]
    return [os.path.normpath(path) for path in found]


def _remote(text: str) -> list[str]:
    magic = glob.has_magic(text.replace("?", ""))  # a ? begins the query of an address
    if text.endswith(".tar") and not magic:
        return [text]
    system, path = file_system(text)
    if not magic and not text.endswith("/"):
        return [text]
    pattern = path if magic else path.rstrip("/") + "/*.tar"
    try:
        found = sorted(with_retries(text, lambda: system.glob(pattern)))
    except OSError as error:
        raise InputError(f"{text} cannot be listed: {error}") from None
    if not found:
        raise InputError(f"no shards match {text!r}")
    return [system.unstrip_protocol(path) for path in found]
