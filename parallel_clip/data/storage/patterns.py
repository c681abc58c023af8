"""Expand shard patterns (files, folders, braces, wildcards, addresses) and look at the files."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from parallel_clip.data.storage.addresses import (
    file_system,
    is_remote,
    remote_stat,
    request,
    stat_of_info,
    without_signature,
)
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.errors import InputError

_THREADS, _PART = 16, 512
_FEW = 8  # files at addresses that are looked at one by one, rather than by a list of their folder
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
    """A file's bytes, and its time of change in ns or `RemoteStat.changed`."""

    size: int
    changed: int


def stat_files(
    paths: Sequence[str], refused: dict[str, str] | None = None
) -> dict[str, FileStat | None]:
    """Look at files, of this machine and at addresses; None where there is none.

    refused: takes those of which a store denies access, or does not answer, with its reason; they
    are None, too.

    InputError: such a file, where there is no `refused` or there are only such files.
    """
    paths = list(dict.fromkeys(paths))
    local = [path for path in paths if not is_remote(path)]
    parts = [local[start : start + _PART] for start in range(0, len(local), _PART)]
    with ThreadPoolExecutor(_THREADS) as threads:  # it waits for the file system
        answers = threads.map(lambda part: [file_stat(path) for path in part], parts)
        found = dict(zip(local, chain.from_iterable(answers), strict=True))
    if len(local) < len(paths):
        denied: dict[str, str] = {}
        remote = [path for path in paths if is_remote(path)]
        found |= _stat_remote(remote, denied)
        if denied and (refused is None or len(denied) == len(remote)):
            raise InputError(next(iter(denied.values())))
        if refused is not None:
            refused |= denied
    return found


def require_files(paths: Sequence[str]) -> dict[str, FileStat]:
    """`stat_files`; InputError names those that are missing."""
    found = stat_files(paths)
    missing = [path for path, status in found.items() if status is None]
    if missing:
        raise InputError(missing_words(missing, len(found)))
    return found


def missing_words(missing: Sequence[str], total: int) -> str:
    """That shards do not exist, and which."""
    shown = ", ".join(missing[:5])
    more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
    where = "" if is_remote(missing[0]) else f" (paths start from {os.getcwd()})"
    return (
        f"{len(missing):,} of {total:,} shards do not exist: {shown}{more}; correct the "
        f"pattern{where}"
    )


def file_stat(path: str) -> FileStat | None:
    """Of a file of this machine; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileStat(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _stat_remote(addresses: list[str], denied: dict[str, str]) -> dict[str, FileStat | None]:
    """By a list of each folder where stores give one, else one by one."""
    found: dict[str, FileStat | None] = {}
    folders: dict[str, list[str]] = {}
    for address in addresses:
        folders.setdefault(parent_and_name(address)[0], []).append(address)
    single = []
    for folder, files in folders.items():
        # A web server's list is a page for people; signed addresses are for one file each.
        lists = not folder.startswith("http") and all(without_signature(f) == f for f in files)
        if lists and len(files) > _FEW:
            found |= _stat_by_list(folder, files)
        else:
            single += files
    with ThreadPoolExecutor(_THREADS) as threads:
        found |= zip(single, threads.map(partial(_stat_address, denied), single), strict=True)
    return found


def _stat_by_list(folder: str, addresses: Sequence[str]) -> dict[str, FileStat | None]:
    system, path = file_system(folder)
    try:
        infos = request(folder, lambda: system.ls(path, detail=True))
    except FileNotFoundError:
        infos = []
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error}") from None
    by_name = {info["name"].rpartition("/")[2]: info for info in infos}
    found: dict[str, FileStat | None] = {}
    for address in addresses:
        info = by_name.get(parent_and_name(address)[1])
        found[address] = None if info is None else FileStat(*stat_of_info(address, info)[:2])
    return found


def _stat_address(denied: dict[str, str], address: str) -> FileStat | None:
    try:
        return FileStat(*remote_stat(address)[:2])
    except FileNotFoundError:
        return None
    except OSError as error:
        denied[address] = f"shard {error}"  # which names it
        return None


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
        found = sorted(request(text, lambda: system.glob(pattern)))
    except OSError as error:
        raise InputError(f"{text} cannot be listed: {error}") from None
    if not found:
        raise InputError(f"no shards match {text!r}")
    return [system.unstrip_protocol(path) for path in found]
