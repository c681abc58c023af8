"""Finding what is bad in shards before a run meets it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from parallel_clip.data.decode import captions_of, decode_picture, label_of
from parallel_clip.data.index import Say
from parallel_clip.data.shards import (
    BadSampleError,
    ShardFiles,
    ShardIndex,
    expand_shards,
    scan_shard,
)
from parallel_clip.errors import InputError

_SECONDS_BETWEEN_REPORTS = 10
_FIRST = 64  # samples of which one must be good


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used; a whole shard where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.reason}" if self.key is not None else self.reason


@dataclass
class CheckReport:
    """What `check_shards` found."""

    shards: int = 0
    samples: int = 0  # those in whole shards, broken ones included
    broken: list[Broken] = field(default_factory=list)


def check_shards(
    patterns: str | Sequence[str],
    say: Say = print,
    *,
    caption_key: str | None = None,
    workers: int = 1,
) -> CheckReport:
    """Read and decode every picture and caption, by `workers` processes.

    Goes on behind broken samples and broken shards; InputError only where shards are missing.
    """
    paths = expand_shards(patterns)
    check = partial(check_shard, caption_key=caption_key)
    if workers <= 1:
        return _gather(map, check, paths, say)
    with ProcessPoolExecutor(workers) as processes:
        return _gather(processes.map, check, paths, say)


def check_shard(path: Path, caption_key: str | None = None) -> CheckReport:
    """The same for one shard."""
    try:
        shard = scan_shard(path)
    except InputError as error:
        return CheckReport(1, 0, [Broken(str(path), None, str(error))])
    report, files = CheckReport(1, shard.samples), ShardFiles()
    for index in range(shard.samples):
        try:
            sample = files.read(shard, index)
            captions_of(sample, caption_key)
            decode_picture(sample)
        except BadSampleError as error:
            report.broken.append(Broken(str(path), error.key, error.reason))
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
    files, first = ShardFiles(), None
    samples = ((shard, index) for shard in shards for index in range(shard.samples))
    tried = list(islice(samples, _FIRST))
    for shard, index in tried:
        try:
            sample = files.read(shard, index)
            decode_picture(sample)
            if need == "captions":
                captions_of(sample, caption_key)
            else:
                label_of(sample)
        except BadSampleError as error:
            first = first or Broken(str(shard.path), error.key, error.reason)
        else:
            return
    wanted = {
        "captions": "a caption, in its .txt or at data.caption_key of its .json",
        "labels": "the number of its class, in its .cls",
    }
    raise InputError(
        f"none of the first {len(tried):,} samples can be used: {first} (the first of them); "
        f"a sample needs a picture and {wanted[need]}"
    )


def _gather(run: Callable, check: Callable, paths: Sequence[Path], say: Say) -> CheckReport:
    total, last_report = CheckReport(), time.monotonic()
    for report in run(check, paths):
        total.shards += report.shards
        total.samples += report.samples
        total.broken += report.broken
        if time.monotonic() - last_report > _SECONDS_BETWEEN_REPORTS:
            last_report = time.monotonic()
            say(
                f"checked {total.shards:,} of {len(paths):,} shards, {total.samples:,} samples, "
                f"{len(total.broken):,} broken"
            )
    return total
