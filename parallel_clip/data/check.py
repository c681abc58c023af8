"""Finding what is bad in shards before a run meets it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

from parallel_clip.data.decode import captions_of, decode_picture, label_of
from parallel_clip.data.index import known_shards
from parallel_clip.data.patterns import expand_shards, require_files
from parallel_clip.data.processes import each
from parallel_clip.data.progress import Say, track
from parallel_clip.data.shards import (
    BadSampleError,
    ShardFiles,
    ShardIndex,
    scan_headers,
)
from parallel_clip.errors import InputError

_FIRST = 64  # samples of which one must be good


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used; a whole shard, or the rest of one, where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.reason}" if self.key is not None else self.reason


@dataclass
class CheckReport:
    """What `check_shards` found.

    samples: those that were found, broken ones included. sides and caption_bytes: how many pictures
    have a shorter side, and captions a length, of at least 2^k pixels or bytes and below 2^(k + 1).
    """

    shards: int = 0
    samples: int = 0
    captions: int = 0
    broken: list[Broken] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)
    caption_bytes: Counter[int] = field(default_factory=Counter)

    def add(self, other: CheckReport) -> None:
        self.shards += other.shards
        self.samples += other.samples
        self.captions += other.captions
        self.broken += other.broken
        self.sides += other.sides
        self.caption_bytes += other.caption_bytes


def check_shards(
    patterns: str | Sequence[str],
    say: Say = print,
    *,
    caption_key: str | None = None,
    workers: int = 1,
) -> CheckReport:
    """Read and decode every picture and caption, by `workers` processes.

    Goes on behind broken samples and broken shards. Where a shard has an index that knows other
    samples than are there, that is said, and the samples it knows are read. InputError only where
    shards are missing.
    """
    paths = expand_shards(patterns)
    require_files(paths)
    known = known_shards(paths, say)
    check = partial(_check_known, caption_key=caption_key)
    jobs = [(path, known.get(path)) for path in paths]
    total = CheckReport()
    for report in track(each(check, jobs, workers), len(paths), "checked", say):
        total.add(report)
    return total


def check_shard(
    path: str, known: ShardIndex | None = None, caption_key: str | None = None
) -> CheckReport:
    """The same for one shard; known: its saved index."""
    report = CheckReport(1)
    try:
        scan = scan_headers(path)
    except InputError as error:
        report.broken.append(Broken(path, None, str(error)))
        return report
    shard = scan.index
    if known is not None and known.table_checksum != shard.table_checksum:
        reason = (
            f"shard {path} is not as it was when it was indexed (if that is meant: parallel-clip "
            "data index)"
        )
        if scan.damage is not None:
            reason += f": {scan.damage}"
        report.broken.append(Broken(path, None, reason))
        shard = known
    elif scan.damage is not None:
        reason = f"shard {path} is not whole: {scan.damage}; nothing behind that can be read"
        report.broken.append(Broken(path, None, reason))
        if scan.key is not None:
            reason = "the shard breaks off, or is damaged, in this sample or behind it"
            report.broken.append(Broken(path, scan.key, reason))
    report.samples = shard.samples
    files = ShardFiles()
    for index in range(shard.samples):
        try:
            sample = files.read(shard, index)
            captions = captions_of(sample, caption_key)
            picture = decode_picture(sample)
        except BadSampleError as error:
            report.broken.append(Broken(path, error.key, error.reason))
            continue
        report.captions += len(captions)
        report.sides[_power(min(picture.size))] += 1
        report.caption_bytes.update(_power(len(caption.encode())) for caption in captions)
    files.close()
    return report


def require_usable(
    shards: Sequence[ShardIndex],
    need: Literal["captions", "labels"],
    caption_key: str | None = None,
) -> None:
    """See that the shards hold what is needed beside pictures: read until a sample is good.

    InputError: none of the first is. Shards of the wrong kind are found so before a run begins,
    where single bad samples are met, and counted, on its way.
    """
    files, first, tried = ShardFiles(), None, 0
    samples = ((shard, index) for shard in shards for index in range(shard.samples))
    for shard, index in islice(samples, _FIRST):
        tried += 1
        try:
            sample = files.read(shard, index)
            decode_picture(sample)
            if need == "captions":
                captions_of(sample, caption_key)
            else:
                label_of(sample)
        except BadSampleError as error:
            first = first or Broken(shard.path, error.key, error.reason)
        except OSError as error:
            raise InputError(f"{shard.path} cannot be read: {error}") from None
        else:
            return
    wanted = {
        "captions": "a caption, in its .txt or at data.caption_key of its .json",
        "labels": "the number of its class, in its .cls",
    }
    raise InputError(
        f"none of the first {tried:,} samples can be used: {first} (the first of them); "
        f"a sample needs a picture and {wanted[need]}"
    )


def _check_known(job: tuple[str, ShardIndex | None], caption_key: str | None) -> CheckReport:
    return check_shard(*job, caption_key)


def _power(number: int) -> int:
    return max(number, 1).bit_length() - 1
