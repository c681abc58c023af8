"""Open shards for reading: files of this machine, or addresses (`s3://...`)."""

from __future__ import annotations

import os
from collections import OrderedDict

from parallel_clip.data.storage.remote import RemoteCache, RemoteFile, is_remote

OPEN_FILES = 256  # per process; each read stream of the order needs 32 at a time


class LocalFile:
    """A file of this machine, read in place."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

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

    def __init__(self, limit: int = OPEN_FILES, cache: RemoteCache | None = None):
        self._limit = limit
        self._cache = cache or RemoteCache()
        self._open: OrderedDict[str, File] = OrderedDict()

    def get(self, path: str, size: int | None = None) -> File:
        """The open file; `size`: that of a remote one, where it is known, which saves asking.

        Raises OSError.
        """
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = open_file(path, self._cache, size)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        return self._open[path]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def open_file(path: str, cache: RemoteCache | None = None, size: int | None = None) -> File:
    if is_remote(path):
        return RemoteFile(path, cache or RemoteCache(), size)
    return LocalFile(path)


def parent_and_name(path: str) -> tuple[str, str]:
    """The folder of a file, and its name in it."""
    parent, _, name = path.rpartition("/")
    return parent or ("/" if path.startswith("/") else "."), name
