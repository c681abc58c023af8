"""A journal of an index that is being made: a record for each shard, written when it has been
scanned, so that a process that is killed loses no more than the shards that it had in hand.

A record: its header, the shard's file name, `ShardIndex.bounds` and `ShardIndex.checksums`, each
uint32. One of no samples notes a shard that cannot be used. Only the last one can be incomplete. A
journal belongs to the process that writes it, which holds a lock on it; others read it, and remove
it once it is in an index and its process has ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel_clip.data.index.index_file import IndexTables
from parallel_clip.data.storage.shards import ShardIndex

_MAGIC = b"PCindex2"
_RECORD = struct.Struct("<8sIIqqI")  # magic, bytes of the name, samples, bytes, changed, checksum
_CRC = struct.Struct("<I")  # of the header and the name
_ENDING = ".part"
_SECONDS_WITHOUT_RECORDS = 3600


class JournalWriter:
    """Appends records to a new journal in a folder, which it makes. Raises OSError."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.path = folder / f"{name}{_ENDING}"
        self._stream = open(folder / name, "xb", buffering=0)  # noqa: SIM115
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / name).rename(self.path)  # only now, locked, do others see it

    def append(self, name: bytes, shard: ShardIndex) -> None:
        header = _RECORD.pack(
            _MAGIC, len(name), shard.samples, shard.bytes, shard.changed, shard.table_checksum
        )
        record = header + _CRC.pack(zlib.crc32(header + name)) + name
        record += shard.bounds.tobytes() + shard.checksums.tobytes()
        while record:  # less at a time where a disk is nearly full
            record = record[self._stream.write(record) :]

    def refuse(self, name: bytes) -> None:
        """Note a shard that was looked at and cannot be used."""
        self.append(name, ShardIndex("", 0, np.zeros(1, np.uint32), np.zeros(0, np.uint32)))

    def close(self) -> None:
        self._stream.close()


@dataclass(frozen=True)
class Journal(IndexTables):
    """An open journal: tables in memory, the rest on disk."""

    offsets: np.ndarray  # int64 [shards], of each `bounds` in the file
    refused: frozenset[bytes]  # names of shards that cannot be used, which have no row

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read the whole records. Raises OSError."""
        rows: dict[bytes, tuple[int, ...]] = {}
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            while (record := _next_record(stream, size)) is not None:
                rows[record[0]] = record[1:]  # the last one of a name counts
        names = sorted(name for name, (samples, *_) in rows.items() if samples)
        columns = np.array([rows[name] for name in names], np.int64).reshape(-1, 5).T
        samples, sizes, changed, checksums, offsets = columns
        return cls(
            path, np.array(names, bytes), sizes, changed, samples, checksums.astype(np.uint32),
            offsets, frozenset(rows).difference(names),
        )  # fmt: skip

    def _read(self, row: int, path: str) -> ShardIndex:
        count = int(self.samples[row])
        with open(self.path, "rb") as stream:
            stream.seek(int(self.offsets[row]))
            numbers = np.fromfile(stream, np.uint32, 2 * count + 1)
        return ShardIndex(
            path, int(self.bytes[row]), numbers[: count + 1], numbers[count + 1 :],
            int(self.changed_ns[row]),
        )  # fmt: skip


def journals_in(folder: Path) -> list[Path]:
    """The journals in a folder, the newest last."""
    found = []
    for path in folder.glob(f"*{_ENDING}"):
        with suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def is_finished(journal: Path) -> bool:
    """Whether the process of a journal has ended, so that nothing will be added to it."""
    try:
        with open(journal, "r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            return False
    # A file system without locks.
    with suppress(OSError):
        return time.time() - journal.stat().st_mtime > _SECONDS_WITHOUT_RECORDS
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file at `path` against other processes, where the file system has
    locks. Raises OSError where its folder cannot be written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "ab") as stream:
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            # The one that held it before has removed it: then it keeps nobody else out any more.
            if not lock.exists() or not os.path.samestat(os.stat(lock), os.fstat(stream.fileno())):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _next_record(stream, size: int) -> tuple[bytes, int, int, int, int, int] | None:
    """The name and the numbers of the record that begins here; None at the end, or where it is not
    whole. Leaves the stream at the next."""
    header = stream.read(_RECORD.size)
    crc = stream.read(_CRC.size)
    if len(crc) < _CRC.size:
        return None
    magic, length, samples, bytes_, changed, checksum = _RECORD.unpack(header)
    name = stream.read(length) if magic == _MAGIC else b""
    offset = stream.tell()
    end = offset + 4 * (2 * samples + 1)
    if _CRC.unpack(crc)[0] != zlib.crc32(header + name) or end > size:
        return None
    stream.seek(end)
    return name, samples, bytes_, changed, checksum, offset
