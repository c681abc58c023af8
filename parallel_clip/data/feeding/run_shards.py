"""The shards of a run, and the orders in which their samples are taken.

Rank 0 finds and checks all shards (`find_run_shards`) and saves their index; the other ranks open
them by that index (`reopen_run_shards`). Orders, length and fingerprint of a run follow from the
shards and the config alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from braceexpand import braceexpand

from parallel_clip.config import parse_bytes, training_sources
from parallel_clip.data.index.index_folder import FolderIndex
from parallel_clip.data.index.scan import FEW
from parallel_clip.data.index.shard_list import (
    ListedShard,
    contents_checksum,
    list_shards,
    shards_added,
)
from parallel_clip.data.index.shard_table import (
    ShardTable,
    check_and_scan,
    check_shards,
    find_checked_shards,
    find_faults,
    first_five,
    open_shards,
    save_index,
    scan_unindexed,
    table_of,
)
from parallel_clip.data.order.run_order import order_seed
from parallel_clip.data.order.sample_order import VERSION as ORDER_VERSION
from parallel_clip.data.order.sample_order import Order, OrderSource
from parallel_clip.data.storage.addresses import StorageSettings, configure_storage, is_remote
from parallel_clip.data.storage.disks import pages_folder
from parallel_clip.data.storage.files import parent_and_name
from parallel_clip.data.storage.patterns import expand_shards
from parallel_clip.data.storage.progress import Print, print_nothing
from parallel_clip.errors import InputError

if TYPE_CHECKING:
    from parallel_clip.config import Config, Data

Folders = dict[str, FolderIndex]


@dataclass(frozen=True)
class RunShards:
    """The shards that a config names, and the orders in which training samples are taken.

    train and orders: of each source and each blend of `training_sources`; held_out: of the keys of
    HELD_OUT_NEEDS that `evaluate` has set; left_out: the paths of those of training that
    `data.missing: skip` does without.
    """

    train: list[ShardTable]
    held_out: dict[str, ShardTable]
    orders: list[Order]
    left_out: list[str] = field(default_factory=list)

    def save_index(self, say: Print = print) -> None:
        """Save the index of what was scanned when the shards were found."""
        for table in (*self.train, *self.held_out.values()):
            save_index(table, say)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order follows from beside the config, and what is in the shards, ready for JSON:
        ranks may only work together where it is equal, and a run may only be resumed where it is
        but for `held_out`."""
        sources = [
            {
                "shards": len(table),
                "samples": table.samples,
                "checksum": zlib.crc32(table.counts.tobytes()),
                "contents": contents_checksum(list_shards([table])),
            }
            for table in self.train
        ]
        held_out = {
            name: contents_checksum(list_shards([table])) for name, table in self.held_out.items()
        }
        return {"order": ORDER_VERSION, "sources": sources, "held_out": held_out}

    @property
    def listed(self) -> list[ListedShard]:
        """The shards of training, apart from where they lie."""
        return list_shards(self.train)

    def sample_bytes(self, order: Order) -> float | None:
        """The bytes that a sample of an epoch takes in its shard, on average; None where they are
        not known."""
        total = 0.0
        for table, pairs in zip(self.train, order.source_samples, strict=True):
            if pairs == 0:
                continue
            sizes = table.bytes()
            known = sizes >= 0
            if not known.any():
                return None
            total += pairs * float(sizes[known].sum()) / max(1, int(table.counts[known].sum()))
        return total / order.samples_per_epoch

    def is_fetched(self, order: Order) -> bool:
        """Whether shards of an order lie at addresses."""
        sources = zip(self.train, order.source_samples, strict=True)
        return any(is_remote(path) for table, pairs in sources if pairs for path in table.paths)


def find_run_shards(
    config: Config,
    say: Print = print,
    *,
    counts_suffice: bool = False,
    begun_with: Sequence[ListedShard] | None = None,
) -> RunShards:
    """Find and check all shards of a run, on rank 0 for all ranks.

    Scans shards that no saved index has, which is said, and keeps what it scans where there are
    many (`scan_unindexed`); writes nothing else. counts_suffice: does not scan those whose number
    of samples a file beside them has, which is enough where no sample is read; writes nothing.
    begun_with: the shards of the sources that the run to be resumed began with: one that
    `data.missing: skip` left out then stays out, though it is there now.

    Raises:
        InputError: no shards, missing, changed or broken ones, an epoch without samples, or wrong
            settings of `data`.
    """
    settings, folders = config.data, Folders()
    keys = training_sources(config).keys
    if not keys:
        raise InputError("data.train names no shards; give a list of {shards: ...}")
    use_storage(settings)
    # Few are scanned again in no time: nothing is written for them before the run is known to be
    # right.
    keep_above = None if counts_suffice else FEW
    left_out: list[str] = []
    paths = _training_paths(config)
    if any(is_remote(path) for source in paths for path in source):
        place, why = pages_folder()
        say(f"pages of shards at addresses: at most {settings.cache} in {place} ({why})")
    train = []
    for number, (named, key) in enumerate(zip(paths, keys, strict=True)):
        table = table_of(named, say, folders)
        if settings.missing == "skip":
            known = [shard for shard in begun_with or () if shard.source == number] or None
            table = _without_missing(table, key, settings, left_out, known, say, keep_above)
        else:
            table = check_and_scan(table, say, counts_suffice=counts_suffice, keep_above=keep_above)
        train.append(table)
    find = partial(
        find_checked_shards,
        say=say,
        folders=folders,
        counts_suffice=counts_suffice,
        keep_above=keep_above,
    )
    return RunShards(train, _held_out(config, find), _orders(config, train), left_out)


def reopen_run_shards(
    config: Config, left_out: Collection[str] = (), *, check: bool = False
) -> RunShards:
    """Find the shards of a run on another rank, after rank 0 has checked them and saved their
    index. Looks at no shard that has one.

    left_out: those that rank 0 does without; check: see that this machine has those of its own
    disks, each as it was indexed; one rank of a machine does that.

    Raises:
        InputError: a shard is missing here, or cannot be read.
    """
    use_storage(config.data)
    folders = Folders()
    train = [
        scan_unindexed(
            table_of(paths, print_nothing, folders).without(left_out), print_nothing
        )
        for paths in _training_paths(config)
    ]  # fmt: skip
    held_out = _held_out(config, partial(open_shards, folders=folders))
    for table in (*train, *held_out.values()) if check else ():
        check_shards(table, local_only=True)
    return RunShards(train, held_out, _orders(config, train), list(left_out))


def use_storage(settings: Data) -> None:
    """Read shards at addresses as the config says, in this process and its workers."""
    configure_storage(
        StorageSettings(
            settings.storage_options,
            settings.retries,
            settings.timeout,
            parse_bytes(settings.cache, "data.cache"),
        )
    )


def _training_paths(config: Config) -> list[list[str]]:
    """The shards of each source, but for those that `data.exclude` names."""
    found = training_sources(config)
    patterns = [text for pattern in config.data.exclude for text in braceexpand(pattern)]
    unused = set(patterns)
    kept: list[list[str]] = []
    for source, key in zip(found.sources, found.keys, strict=True):
        paths = expand_shards(source.shards)
        kept.append([])
        for path in paths:
            found = [p for p in patterns if _is_named(path, p)]
            unused.difference_update(found)
            if not found:
                kept[-1].append(path)
        if not kept[-1]:
            raise InputError(f"data.exclude leaves none of the {len(paths):,} shards of {key}")
    if unused:
        raise InputError(
            f"data.exclude names {', '.join(sorted(unused)[:5])}, which is no shard of training; "
            "a pattern is compared with the file's name and with its whole path"
        )
    return kept


def _is_named(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(parent_and_name(path)[1], pattern)


def _without_missing(
    table: ShardTable,
    key: str,
    settings: Data,
    left_out: list[str],
    begun_with: list[ListedShard] | None,
    say: Print,
    keep_above: int | None,
) -> ShardTable:
    """The table of the source at `key` of the config without the shards that are missing or cannot
    be used, which go to `left_out`. begun_with: of this source."""
    total = len(table)
    faults = find_faults(table)
    table = table.without(faults)
    bad: dict[str, str] = {}
    table = scan_unindexed(table, say, keep_above=keep_above, bad=bad)
    table, faults = table.without(bad), faults | bad
    if begun_with is not None:
        source = begun_with[0].source
        listed = [shard._replace(source=source) for shard in list_shards([table])]
        back = [table.paths[n] for n in shards_added(begun_with, listed)]
        faults |= {path: f"shard {path} was left out when the run began" for path in back}
        table = table.without(back)
    if not len(table):
        raise InputError(
            f"none of the {total:,} shards of {key} can be used:\n"
            + "\n".join(first_five(list(faults.values())))
        )
    if not faults:
        return table
    fraction = len(faults) / total
    if fraction > settings.max_missing_fraction:
        raise InputError(
            f"{len(faults):,} of {total:,} shards of {key} cannot be used, "
            f"{fraction:.2%}, and data.max_missing_fraction is "
            f"{settings.max_missing_fraction:.2%}:\n" + "\n".join(first_five(list(faults.values())))
        )
    say(
        f"data.missing: skip leaves out {len(faults):,} of {total:,} shards:\n  "
        + "\n  ".join(first_five(list(faults.values())))
    )
    left_out += faults
    return table


def _held_out(config: Config, find: Callable[[Any], ShardTable]) -> dict[str, ShardTable]:
    wanted, held_out = config.evaluate, {}
    if wanted.loss is not None:
        held_out["loss"] = find(wanted.loss)
    if wanted.retrieval is not None:  # one set for both is encoded once
        same = wanted.retrieval == wanted.loss
        held_out["retrieval"] = held_out["loss"] if same else find(wanted.retrieval)
    if wanted.zero_shot is not None:
        held_out["zero_shot"] = find(wanted.zero_shot.shards)
    return held_out


def _orders(config: Config, train: Sequence[ShardTable]) -> list[Order]:
    """The order of each blend, over all sources: those that it lacks have a weight of 0."""
    found, orders = training_sources(config), []
    for number, blend in enumerate(found.blends):
        sources = [
            OrderSource(table.counts, weight, source.samples)
            for source, weight, table in zip(found.sources, blend, train, strict=True)
        ]
        try:
            order = Order(sources, order_seed(config.seed, number), config.batch.global_)
        except InputError as error:
            of_phase = f"phases.{found.phases_of(number)[0]}: " if len(found.blends) > 1 else ""
            raise InputError(f"{of_phase}{error}") from None
        orders.append(order)
    return orders
