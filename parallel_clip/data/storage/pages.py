"""Pages of files at addresses, kept in a folder on this machine's disk.

A file is read in pages of `PAGE` bytes; the order reads neighbouring samples near one another, so a
page serves many of them. All processes of a machine share the folder; where it grows beyond its
limit the pages used longest ago go first. A page ends with a hash of its name and bytes, and one
that is cut or changed is fetched again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from parallel_clip.data.storage.addresses import (
    fetch_part,
    remote_stat,
    storage_settings,
    without_signature,
)
from parallel_clip.data.storage.disks import pages_folder

PAGE = 2**20
_HASH_BYTES = 8
_KEPT_AFTER_CLEANING = 0.9
_WRITERS = 16  # processes of a machine that may fill what is free at the same time


class PageCache:
    """Pages in a folder that all processes of a machine share.

    limit: bytes that it may hold, None for that of `storage_settings()`; each process that writes
    may exceed it by some pages. folder: None for `pages_folder()`.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit = storage_settings().cache if limit is None else limit
        self.folder = folder or pages_folder().path
        self._pages_until_cleaning = 0

    def page(self, name: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """The page of this name and of `size` bytes: as it is kept, else what `fetch()` returns."""
        file = self.folder / name[:2] / name
        with suppress(OSError):
            kept = file.read_bytes()
            data = kept[:size]
            if len(kept) == size + _HASH_BYTES and kept[size:] == _hash(name, data):
                os.utime(file)  # used now
                return data
        data = fetch()
        self._keep(file, data)
        return data

    def _keep(self, file: Path, data: bytes) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if self._pages_until_cleaning == 0:
                free = max(0, self.limit - self._clean())
                self._pages_until_cleaning = max(1, free // PAGE // _WRITERS)
            self._pages_until_cleaning -= 1
            temporary.write_bytes(data + _hash(file.name, data))
            temporary.replace(file)
        except OSError:  # full, or not writable: it is a cache, and reading goes on without
            with suppress(OSError):
                temporary.unlink()

    def _clean(self) -> int:
        """Remove the pages used longest ago where there are too many; the bytes that are left."""
        pages = []
        for page in self.folder.glob("*/*"):
            with suppress(OSError):  # another process was quicker
                status = page.stat()
                pages.append((status.st_mtime_ns, status.st_size, page))
        held = sum(size for _, size, _ in pages)
        if held <= self.limit:
            return held
        for _, size, page in sorted(pages):
            if held <= _KEPT_AFTER_CLEANING * self.limit:
                break
            with suppress(OSError):
                page.unlink(missing_ok=True)
            held -= size
        return held


class RemoteFile:
    """A file at an address, read page by page through the cache.

    size, changed: as an index has them; where they are None, the store is asked. A file of another
    size or with another `changed` is another file to the cache.
    """

    def __init__(
        self, address: str, cache: PageCache, size: int | None = None, changed: int | None = None
    ):
        self._address = address
        self._cache = cache
        if size is None or changed is None:
            size, changed, _ = remote_stat(address)
        self.size, self.changed = size, changed
        name = f"{without_signature(address)} {size} {changed}"
        self._name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
        self._last: tuple[int, bytes] | None = None

    def read(self, size: int, offset: int) -> bytes:
        """Fewer bytes than wanted only at the file's end. Raises OSError."""
        end = min(offset + size, self.size)
        parts = []
        for number in range(offset // PAGE, -(-end // PAGE)):
            start = number * PAGE
            parts.append(self._page(number)[max(offset - start, 0) : end - start])
        return b"".join(parts)

    def close(self) -> None:
        self._last = None

    def _page(self, number: int) -> bytes:
        if self._last is None or self._last[0] != number:
            start, end = number * PAGE, min((number + 1) * PAGE, self.size)
            page = self._cache.page(
                f"{self._name}.{number}.{PAGE}",
                end - start,
                lambda: fetch_part(self._address, start, end),
            )
            self._last = number, page
        return self._last[1]


def _hash(name: str, data: bytes) -> bytes:
    """Of a page and its name: one that was moved is not the page of its new name."""
    digest = xxhash.xxh3_64(name.encode())
    digest.update(data)
    return digest.digest()
