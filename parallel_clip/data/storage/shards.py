"""WebDataset shards: scan one for its samples, and read a sample.

A sample is a run of files with one key: the path up to the first dot of the file's name. The rest
of the name, in lower case, says what the file is: `jpg`, `txt`, `json`, `cls`, ...
"""

from __future__ import annotations

import re
import zlib
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from parallel_clip.data.storage.files import File, OpenFiles, open_file
from parallel_clip.data.storage.sample_runs import Run, find_disorder
from parallel_clip.data.storage.tar import NoEndMarkError, TarError, members, printable
from parallel_clip.errors import InputError

MAX_SAMPLE_BYTES = 128 * 2**20  # of all files of a sample together
TAR_BLOCK = 512  # of a tar: samples begin at multiples of it
REPEATED = 0  # in place of a checksum: an earlier sample of the shard has the same key

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


class BadSampleError(Exception):
    """A sample cannot be used; `key` is "number N" where not even its key could be read."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason


class ChangedSampleError(BadSampleError):
    """A sample is not what the index of its shard knows."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are: sample i is the blocks [bounds[i], bounds[i + 1]) of 512
    bytes, and `checksums[i]` is that of its headers, or REPEATED. `changed` is the file's time of
    change in ns, or what `RemoteStat.changed` is."""

    path: str
    bytes: int
    bounds: np.ndarray  # uint32 [samples + 1]
    checksums: np.ndarray  # uint32 [samples]
    changed: int = 0

    @property
    def samples(self) -> int:
        return len(self.checksums)

    def span(self, index: int) -> tuple[int, int]:
        """Offsets in bytes of a sample's begin and end."""
        return int(self.bounds[index]) * TAR_BLOCK, int(self.bounds[index + 1]) * TAR_BLOCK

    @property
    def table_checksum(self) -> int:
        """CRC-32 of all that is in the shard."""
        return zlib.crc32(self.checksums.tobytes(), zlib.crc32(self.bounds.tobytes(), self.bytes))


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in its shard: its key as `printable`, the contents of its files by
    extension, and of those that are links what they are, in words."""

    key: str
    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What reading the headers of a shard found.

    damage: why the shard is refused (None: it is not), with the key at which that was and, where
    fetching or writing it again as it was does not help, what to do. note: what its owner should
    know of a shard that is not refused.
    """

    index: ShardIndex  # of the whole samples
    damage: str | None = None
    key: str | None = None
    advice: str | None = None
    note: str | None = None

    def refusal(self) -> str:
        """The damage as a sentence."""
        if self.advice is not None:
            return f"shard {self.index.path} cannot be used: {self.damage}; {self.advice}"
        whole = f" ({self.index.samples:,} samples before that are whole)" if self.key else ""
        return (
            f"shard {self.index.path} is not whole: {self.damage}{whole}; fetch or write it again, "
            "or leave it out"
        )


def split_name(name: str) -> tuple[str, str] | None:
    """A member's (key, extension); None for a file of no sample (hidden, `__meta__`, no dot)."""
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match[1], match[2].lower()


def scan_shard(path: str) -> ShardIndex:
    """The index of a shard, by reading its headers; InputError where it is refused. Where only its
    end mark is missing it is not; `scan_headers` has a note then."""
    scan = scan_headers(path)
    if scan.damage is not None:
        raise InputError(scan.refusal())
    return scan.index


def scan_headers(path: str) -> Scan:
    """The index of the whole samples of a shard that may be damaged, and what the damage is.
    InputError where it cannot be read at all."""
    runs: list[Run] = []
    firsts: dict[str, Run] = {}
    checksums: list[int] = []
    end, damage, note, advice = 0, None, None, None
    try:
        with closing(open_file(path)) as file:
            if file.size == 0:
                raise TarError("it is empty (0 bytes)")
            for member in members(file.read, file.size):
                name = split_name(member.name)
                if name is None:
                    continue
                key, extension = name
                if not runs or key != runs[-1].key:
                    first = firsts.get(key)
                    runs.append(Run(member.header, key, first))
                    checksums.append(_SEED if first is None else REPEATED)
                    firsts.setdefault(key, runs[-1])
                runs[-1].extensions.append(extension)
                if checksums[-1] != REPEATED and member.link is None:
                    checksums[-1] = _with_member(checksums[-1], member.checksum)
                end = member.end
    except OSError as error:
        raise InputError(f"shard {path} cannot be read: {error.strerror or error}") from error
    except NoEndMarkError as error:
        note = f"{error}; {_NO_END_MARK}"
    except TarError as error:
        damage, advice = str(error), error.advice
    starts, last_key = [run.begin for run in runs], None
    if damage is None and not runs:
        damage = "it holds no samples (no file named KEY.EXTENSION)"
        advice = "name its files so, or leave it out"
    elif damage is None:
        damage, advice = find_disorder(runs) or (None, None)
    elif runs:  # the sample that was being read may not be whole
        last_key = printable(runs[-1].key)
        end = starts.pop()
        checksums.pop()
    bounds = (np.array([*starts, end], np.int64) // TAR_BLOCK).astype(np.uint32)
    index = ShardIndex(path, file.size, bounds, np.array(checksums, np.uint32), file.changed)
    return Scan(index, damage, last_key, advice, note if damage is None else None)


_NO_END_MARK = (
    "its writer was killed, or it was cut off there on its way, which cannot be told apart. Its "
    "samples are used; see whether it is as large, and has as many samples, as where it is from"
)
_SEED = 1


def _with_member(checksum: int, member: int) -> int:
    """The checksum of a sample's headers with those of one more file; never REPEATED."""
    return zlib.crc32(member.to_bytes(4, "little"), checksum) or _SEED


class ShardFiles:
    """Reads samples of shards through a cache of open files."""

    def __init__(self, files: OpenFiles | None = None):
        self._files = files or OpenFiles()

    def read(self, shard: ShardIndex, index: int) -> StoredSample:
        """Sample `index` of a shard, by one read.

        Raises BadSampleError if the sample is not what the index knows or larger than
        MAX_SAMPLE_BYTES, OSError if the file system fails: a sample is bad only for what it is, or
        runs would differ by chance.
        """
        start, end = shard.span(index)
        file = self._files.get(shard.path, shard.bytes, shard.changed)
        if not 0 < end - start <= MAX_SAMPLE_BYTES:
            reason = f"{end - start:,} bytes, at most {MAX_SAMPLE_BYTES:,} are read"
            raise BadSampleError(_first_key(file, shard, index), reason)
        if shard.checksums[index] == REPEATED:
            reason = "its key stands twice in the shard"
            raise BadSampleError(_first_key(file, shard, index), reason)
        data = file.read(end - start, start)
        key, files, links, checksum = "", {}, {}, _SEED
        try:
            for member in members(lambda n, at: data[at : at + n], len(data), end_mark=False):
                name = split_name(member.name)
                if name is None:
                    continue
                if key and name[0] != key:
                    if member.link is not None:  # in indexes of old, links belong to no sample
                        continue
                    other = printable(name[0])
                    raise TarError(f"a file of {other} where one of {printable(key)} was")
                key = name[0]
                if member.link is not None:
                    links[name[1]] = member.link
                    continue
                if name[1] in files:
                    raise TarError(f"two files .{name[1]}")
                files[name[1]] = data[member.offset : member.offset + member.size]
                checksum = _with_member(checksum, member.checksum)
            if len(data) < end - start:
                raise TarError("the shard has become shorter since it was indexed")
            if checksum != shard.checksums[index]:
                raise TarError("other files are here than when it was indexed")
        except TarError as error:
            known = printable(key) or _number(index)
            raise ChangedSampleError(known, f"damaged in the shard: {error}") from None
        return StoredSample(printable(key), files, links)

    def has_ends_of(self, shard: ShardIndex) -> bool:
        """Whether the first and the last sample are those that the index knows."""
        for index in {0, shard.samples - 1}:
            try:
                self.read(shard, index)
            except (ChangedSampleError, OSError):
                return False
            except BadSampleError:  # as it was when it was indexed
                continue
        return True

    def close(self) -> None:
        self._files.close()


def _first_key(file: File, shard: ShardIndex, index: int) -> str:
    start, end = shard.span(index)
    try:
        first = next(members(lambda n, at: file.read(n, start + at), end - start, end_mark=False))
    except (TarError, StopIteration):
        return _number(index)
    name = split_name(first.name)
    return _number(index) if name is None else printable(name[0])


def _number(index: int) -> str:
    return f"number {index}"
