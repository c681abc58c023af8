"""What the shards of a run are, apart from where they lie: to compare what two ranks see, and what
a run began with and goes on over."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from parallel_clip.data.index.shard_table import ShardTable
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.tar import printable

_SHOWN = 3


class ListedShard(NamedTuple):
    """A shard of a source: its file's name (`printable`), how many samples it has, and the checksum
    of its index, which differs where any header in it does; -1: not known."""

    source: int
    name: str
    samples: int
    checksum: int


def list_shards(tables: Sequence[ShardTable]) -> list[ListedShard]:
    """The shards of all sources, in the order in which samples are counted."""
    return [
        ListedShard(source, printable(parent_and_name(path)[1]), int(samples), int(checksum))
        for source, table in enumerate(tables)
        for path, samples, checksum in zip(
            table.paths, table.counts, table.table_checksums(), strict=True
        )
    ]


def contents_checksum(shards: Sequence[ListedShard]) -> int | None:
    """CRC-32 of names and checksums in their order; None where one is not known."""
    if any(shard.checksum < 0 for shard in shards):
        return None
    return zlib.crc32("\n".join(f"{s.name} {s.checksum}" for s in shards).encode())


def describe_differences(before: Sequence[ListedShard], now: Sequence[ListedShard]) -> str:
    """In words, by name: which shards are gone, new, or have other samples. Several shards of a
    source may have one name, in folders of their own."""
    old, new = _by_name(before), _by_name(now)
    groups = {
        "gone": [key for key in old if len(old[key]) > len(new.get(key, ()))],
        "new": [key for key in new if len(new[key]) > len(old.get(key, ()))],
        "of other samples": [
            key for key in old if len(old[key]) == len(new.get(key, ())) and old[key] != new[key]
        ],
    }
    parts = [
        f"{', '.join(name for _, name in keys[:_SHOWN])}"
        f"{f' and {len(keys) - _SHOWN:,} more' if len(keys) > _SHOWN else ''} "
        f"{'is' if len(keys) == 1 else 'are'} {words}"
        for words, keys in groups.items()
        if keys
    ]
    if not parts:
        moved = [new.name for old, new in zip(before, now, strict=True) if old != new]
        parts = [f"shards stand in another order, from {name} on" for name in moved[:1]]
    return "; ".join(parts) or "the shards are the same"


def shards_added(before: Sequence[ListedShard], now: Sequence[ListedShard]) -> list[int]:
    """Which of `now`, by number, are more than there were before: of a name that has become more
    frequent, those with samples that none of that name had."""
    old = _by_name(before)
    surplus = Counter((shard.source, shard.name) for shard in now)
    surplus.subtract({key: len(shards) for key, shards in old.items()})
    added = []
    for number, shard in enumerate(now):
        key = shard.source, shard.name
        if surplus[key] > 0 and (shard.samples, shard.checksum) not in old.get(key, ()):
            surplus[key] -= 1
            added.append(number)
    return added


def _by_name(shards: Sequence[ListedShard]) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """(samples, checksum) of the shards of each source and name, sorted."""
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for shard in shards:
        found.setdefault((shard.source, shard.name), []).append((shard.samples, shard.checksum))
    return {key: sorted(of_name) for key, of_name in found.items()}


def as_text(shards: Sequence[ListedShard]) -> str:
    """A line a shard: source, name, samples, checksum, by tabs."""
    return "".join("\t".join(map(str, shard)) + "\n" for shard in shards)


def read_list(file: Path) -> list[ListedShard] | None:
    """What `as_text` gave; None where the file is not there or damaged."""
    try:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        return [ListedShard(int(s), name, int(n), int(c)) for s, name, n, c in rows]
    except (OSError, ValueError):
        return None
