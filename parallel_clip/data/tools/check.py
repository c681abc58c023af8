"""Read and decode every sample of shards, and report the bad ones: `data check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from parallel_clip.data.index.shard_table import UNKNOWN, find_shards
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import MAX_PIXELS, PictureRule, decode_picture
from parallel_clip.data.storage.addresses import is_remote
from parallel_clip.data.storage.patterns import file_stat, require_files
from parallel_clip.data.storage.processes import parallel_map
from parallel_clip.data.storage.progress import Print, show_progress
from parallel_clip.data.storage.shards import (
    BadSampleError,
    Scan,
    ShardFiles,
    ShardIndex,
    scan_headers,
)
from parallel_clip.errors import InputError


@dataclass(frozen=True)
class BadItem:
    """A sample that cannot be used; a whole shard, or the rest of one, where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.reason}" if self.key is not None else self.reason


@dataclass(frozen=True)
class Remark:
    """What the owner of a shard should know of it; it can be used."""

    shard: str
    text: str

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.text}"


@dataclass
class CheckReport:
    """The counts, the bad items and the remarks that `decode_all_shards` found.

    samples: those that were found, broken ones included. sides and caption_bytes: how many pictures
    have a shorter side, and captions a length, of at least 2^k pixels or bytes and below 2^(k + 1).
    """

    shards: int = 0
    samples: int = 0
    captions: int = 0
    broken: list[BadItem] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)
    caption_bytes: Counter[int] = field(default_factory=Counter)

    def add(self, other: CheckReport) -> None:
        self.shards += other.shards
        self.samples += other.samples
        self.captions += other.captions
        self.broken += other.broken
        self.remarks += other.remarks
        self.sides += other.sides
        self.caption_bytes += other.caption_bytes


def decode_all_shards(
    patterns: str | Sequence[str],
    say: Print = print,
    *,
    caption_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
) -> CheckReport:
    """Read and decode every picture and caption, by `workers` processes.

    Continues after broken samples and broken shards. Where a shard has an index that knows other
    samples than are there, that is said, and the samples it knows are read. InputError only where
    shards are missing when it begins; WorkerError where a process is killed.
    """
    table = find_shards(patterns, say)
    require_files(table.paths)
    check = partial(check_shard, caption_key=caption_key, max_pixels=max_pixels)
    # One at a time: of all together they may be more than memory holds.
    known = (None if n == UNKNOWN else table[number] for number, n in enumerate(table.counts))
    reports = parallel_map(check, table.paths, known, workers=workers)
    total = CheckReport()
    for report in show_progress(reports, len(table), "checked", say):
        total.add(report)
    return total


def check_shard(
    path: str,
    known: ShardIndex | None = None,
    caption_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> CheckReport:
    """`decode_all_shards` for one shard; known: its saved index."""
    report = CheckReport(1)
    before = file_stat(path)
    try:
        scan = scan_headers(path)
        shard = _choose_index(scan, known, report)
        report.samples = shard.samples
        if scan.advice is None:
            _decode_samples(shard, CaptionRule(caption_key), PictureRule(max_pixels), report)
    except InputError as error:
        report.broken.append(BadItem(path, None, str(error)))
    except OSError as error:
        reason = f"shard {path} cannot be read: {error.strerror or error}"
        report.broken.append(BadItem(path, None, reason))
    else:
        if not is_remote(path) and file_stat(path) != before:
            reason = f"shard {path} was changed, or went, while it was checked; check it again"
            report.broken.append(BadItem(path, None, reason))
    return report


def _choose_index(scan: Scan, known: ShardIndex | None, report: CheckReport) -> ShardIndex:
    """The samples to look for; what is wrong with the shard is added to the report."""
    path = scan.index.path
    if scan.note is not None:
        report.remarks.append(Remark(path, scan.note))
    if scan.advice is not None:  # it must be written again, so what its samples are is no matter
        report.broken.append(BadItem(path, None, scan.refusal()))
    elif known is not None and known.table_checksum != scan.index.table_checksum:
        reason = (
            f"shard {path} is not as it was when it was indexed (if that is meant: parallel-clip "
            "data index)"
        )
        if scan.damage is not None:
            reason += f": {scan.damage}"
        report.broken.append(BadItem(path, None, reason))
        return known
    elif scan.damage is not None:
        reason = f"shard {path} is not whole: {scan.damage}; nothing behind that can be read"
        report.broken.append(BadItem(path, None, reason))
        if scan.key is not None:
            reason = "the shard breaks off, or is damaged, in this sample or behind it"
            report.broken.append(BadItem(path, scan.key, reason))
    return scan.index


def _decode_samples(
    shard: ShardIndex, rule: CaptionRule, pictures: PictureRule, report: CheckReport
) -> None:
    """Decode each sample, and add it to the report. Raises OSError where the file fails."""
    with closing(ShardFiles()) as files:
        for index in range(shard.samples):
            try:
                sample = files.read(shard, index)
                captions = rule.captions_of(sample)
                picture = decode_picture(sample, pictures)
            except BadSampleError as error:
                report.broken.append(BadItem(shard.path, error.key, error.reason))
                continue
            report.captions += len(captions)
            report.sides[_power(min(picture.size))] += 1
            report.caption_bytes.update(_power(len(caption.encode())) for caption in captions)


def _power(number: int) -> int:
    return max(number, 1).bit_length() - 1
