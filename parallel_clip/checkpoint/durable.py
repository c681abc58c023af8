"""File operations that are on the disk when they return: the only way a save touches it.

A file or folder counts once its name does: the content is flushed before the rename that shows it,
the folder that holds the name after. NFS and Lustre keep these promises for the host that calls;
what other hosts see may be seconds old.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import xxhash

_READ_BYTES = 4 << 20


class FileRecord(NamedTuple):
    """The size of a file in bytes, and the XXH3 hash (128 bits, hexadecimal) of its content."""

    bytes: int
    hash: str


def write_new(path: Path, chunks: Iterable[memoryview | bytes]) -> FileRecord:
    """Write a file that does not exist yet. The hash is that of the memory it is written from."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with path.open("xb", buffering=0) as file:
            for chunk in chunks:
                rest = memoryview(chunk)
                digest.update(rest)
                size += rest.nbytes
                while rest.nbytes:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not say where
        raise
    return FileRecord(size, digest.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """What `write_new` returned, if the file is still the same."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def replace_text(path: Path, text: str) -> None:
    """Write a text file, or put a new one in its place: whoever reads it finds the old or the new
    one, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write_new(temporary, [text.encode()])
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot: SMB, FUSE
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, by Linux's renameat2; False where the file system or the C
    library cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    here, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(one), os.fsencode(other)
    if library.renameat2(here, names[0], here, names[1], exchange_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one))


def remove_folder(folder: Path) -> None:
    """Remove a folder whose name no longer counts. What cannot be removed stays for the next try:
    a save that has succeeded does not fail over it."""
    shutil.rmtree(folder, ignore_errors=True)
