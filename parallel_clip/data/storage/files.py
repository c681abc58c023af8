"""Open shards for reading: files of this machine, or addresses (`s3://...`)."""

from __future__ import annotations

import os
from collections import OrderedDict

from parallel_clip.data.storage.addresses import is_remote, without_signature
from parallel_clip.data.storage.pages import PageCache, RemoteFile

OPEN_FILES = 256  # per process; each read stream of the order needs 32 at a time


class LocalFile:
    """A file of this machine, read in place. changed: its time of change, in ns."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.changed = status.st_size, status.st_mtime_ns

    def read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while 0 < len(data) < size:  # a signal, or a file system that gives less at a time
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        os.close(self._descriptor)


File = LocalFile | RemoteFile  # `read` gives fewer bytes than wanted only at the file's end


class OpenFiles:
    """A least-recently-used cache of open files, at most `limit` of them."""

    def __init__(self, limit: int = OPEN_FILES, cache: PageCache | None = None):
        self._limit = limit
        self._cache = cache or PageCache()
        self._open: OrderedDict[str, File] = OrderedDict()

    def get(self, path: str, size: int | None = None, changed: int | None = None) -> File:
        """The open file; size and changed: those of one at an address, where an index has them,
        which saves asking.

        Raises OSError.
        """
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = open_file(path, self._cache, size, changed)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        return self._open[path]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def open_file(
    path: str, cache: PageCache | None = None, size: int | None = None, changed: int | None = None
) -> File:
    if is_remote(path):
        return RemoteFile(path, cache or PageCache(), size, changed)
    return LocalFile(path)


def parent_and_name(path: str) -> tuple[str, str]:
    """The folder of a file, and its name in it: that of an address without its signature."""
    path, mark, query = without_signature(path).partition("?" if is_remote(path) else "\0")
    parent, _, name = path.rpartition("/")
    return parent or ("/" if path.startswith("/") else "."), name + mark + query
