"""Which sample stands at which position of a run: a pure function of (seed, position).

Shards are cut into blocks of consecutive samples. An epoch permutes the blocks, takes them `WINDOW`
at a time and permutes the positions inside such a window: so reading touches `WINDOW` stretches of
files at a time, and a sample may land anywhere in the epoch. Positions run on from epoch to epoch;
nothing here knows of ranks, workers or batches, and resuming a run is knowing one integer.

Random numbers are raw Philox words (a stream that numpy promises to keep) sorted to permutations,
so the order does not change with numpy's version.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from parallel_clip.errors import InputError

# Part of the order's definition: another value is another order, and a resumed run would not match.
BLOCK = 128  # consecutive samples of one shard
WINDOW = 128  # blocks shuffled together

Value = TypeVar("Value")


@dataclass(frozen=True)
class Source:
    """The samples of each shard, how often each sample comes, and a limit to the first so many."""

    shard_samples: Sequence[int]
    weight: float = 1.0
    samples: int | None = None


class SampleAddress(NamedTuple):
    """A sample's place: source, shard within the source, sample within the shard, from 0 each."""

    source: int
    shard: int
    index: int
    epoch: int


def name_to_int(*name: int | str) -> int:
    """A 128-bit integer from a name such as (seed, "window", 3): equal on every machine."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


class Order:
    """The order of all samples of a run.

    `at` costs two binary searches; memory is a few integers a block for each of the two epochs that
    a batch may span.
    """

    def __init__(self, sources: Sequence[Source], seed: int):
        self.seed = seed
        sizes = [_limited(source) for source in sources]
        self._samples = [int(shards.sum()) for shards in sizes]
        self._shard_samples = np.concatenate([*sizes, np.empty(0, np.int64)])
        self._shard_source = np.repeat(np.arange(len(sizes)), [len(shards) for shards in sizes])
        self._source_shard = _starts(np.array([len(shards) for shards in sizes], np.int64))
        blocks = -(-self._shard_samples // BLOCK)
        self._shard_block = _starts(blocks)
        self._source_block = self._shard_block[self._source_shard]

        self._copies, self._extra = [], []
        for source, samples in zip(sources, self._samples, strict=True):
            copies = math.floor(source.weight)
            self._copies.append(copies)
            self._extra.append(round(source.weight * samples) - copies * samples)
        self.samples_per_epoch = sum(
            copies * samples + extra
            for copies, samples, extra in zip(self._copies, self._samples, self._extra, strict=True)
        )
        if self.samples_per_epoch == 0:
            raise InputError(
                "an epoch has no samples: the sources hold "
                f"{self._samples} at weights {[source.weight for source in sources]}; "
                "raise data.train.*.weight or data.train.*.samples"
            )
        self._stride = _coprime_near(0.618 * self.samples_per_epoch, self.samples_per_epoch)
        self._epochs = _Recent[_Epoch](2)
        self._windows = _Recent[np.ndarray](4)

    def at(self, position: int) -> SampleAddress:
        """The sample at `position` (from 0, running on over epochs)."""
        number, place = divmod(position, self.samples_per_epoch)
        epoch = self._epochs.get(number, lambda: self._make_epoch(number))
        window = int(np.searchsorted(epoch.window_ends, place, side="right"))
        start = int(epoch.window_ends[window - 1]) if window else 0
        size = int(epoch.window_ends[window]) - start
        shuffle = self._windows.get(
            (number, window),
            lambda: _permutation(size, self.seed, "window", number, window),
        )
        place = start + int(shuffle[place - start])
        item = int(np.searchsorted(epoch.ends, place, side="right"))
        within = place - (int(epoch.ends[item - 1]) if item else 0)
        block = int(epoch.blocks[item])
        shard, first, block_size = self._block(block)
        if epoch.partial[item]:
            within = int(_permutation(block_size, self.seed, "fraction", number, block)[within])
        source = int(self._shard_source[shard])
        return SampleAddress(
            source, shard - int(self._source_shard[source]), first + within, number
        )

    def substitute(self, position: int, attempt: int) -> int:
        """The position whose sample stands in for a bad one at `position`, at try 1, 2, ...

        In the same epoch, far from `position`, and different at every try below
        `samples_per_epoch`.
        """
        epoch, place = divmod(position, self.samples_per_epoch)
        place = (place + attempt * self._stride) % self.samples_per_epoch
        return epoch * self.samples_per_epoch + place

    def _block(self, block: int) -> tuple[int, int, int]:
        """(shard counted over all sources, first sample in it, samples) of a block."""
        shard = int(np.searchsorted(self._shard_block, block, side="right")) - 1
        first = (block - int(self._shard_block[shard])) * BLOCK
        return shard, first, min(BLOCK, int(self._shard_samples[shard]) - first)

    def _make_epoch(self, number: int) -> "_Epoch":
        items, sizes, partial = [], [], []
        for source in range(len(self._samples)):
            first, end = self._source_block[source], self._source_block[source + 1]
            blocks = np.arange(first, end)
            block_sizes = self._block_sizes(source)
            for _ in range(self._copies[source]):
                items.append(blocks)
                sizes.append(block_sizes)
                partial.append(np.zeros(len(blocks), bool))
            if self._extra[source]:
                shares = _shares(block_sizes, self._extra[source], self.seed, number, source)
                chosen = shares > 0
                items.append(blocks[chosen])
                sizes.append(shares[chosen])
                partial.append(np.ones(int(chosen.sum()), bool))
        sizes = np.concatenate(sizes)
        shuffle = _permutation(len(sizes), self.seed, "blocks", number)
        ends = np.cumsum(sizes[shuffle])
        last_of_windows = np.minimum(np.arange(WINDOW, len(ends) + WINDOW, WINDOW), len(ends)) - 1
        return _Epoch(
            blocks=np.concatenate(items)[shuffle],
            partial=np.concatenate(partial)[shuffle],
            ends=ends,
            window_ends=ends[last_of_windows],
        )

    def _block_sizes(self, source: int) -> np.ndarray:
        shards = slice(self._source_shard[source], self._source_shard[source + 1])
        samples = self._shard_samples[shards]
        blocks = -(-samples // BLOCK)
        sizes = np.full(int(blocks.sum()), BLOCK, np.int64)
        held = blocks > 0
        sizes[np.cumsum(blocks)[held] - 1] = samples[held] - (blocks[held] - 1) * BLOCK
        return sizes


@dataclass(frozen=True)
class _Epoch:
    """The blocks of an epoch as they follow one another; arrays [blocks] but for `window_ends`."""

    blocks: np.ndarray  # number of the block, over all sources
    partial: np.ndarray  # bool: only some of the block's samples, by the fraction of a weight
    ends: np.ndarray  # position in the epoch after the last sample of each
    window_ends: np.ndarray  # [windows] the same of each window's last block


class _Recent(Generic[Value]):
    """The values last asked for, up to a number of them."""

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict[object, Value] = OrderedDict()

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
            if len(self._values) > self._limit:
                self._values.popitem(last=False)
        return self._values[key]


def _limited(source: Source) -> np.ndarray:
    """Samples of each shard that count, int64 [shards]: the source's first `samples`."""
    sizes = np.asarray(source.shard_samples, np.int64)
    if source.samples is None:
        return sizes
    return np.diff(np.minimum(_starts(sizes), source.samples))


def _shares(sizes: np.ndarray, total: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """`total` samples spread over blocks of `sizes`, int64 [blocks], each sample equally likely.

    A block gets its exact share rounded down; the remainders are added up in a random order, and
    wherever their sum passes a whole number the block there gets one sample more.
    """
    samples = int(sizes.sum())
    shares, remainders = np.divmod(sizes * total, samples)
    shuffle = _permutation(len(sizes), seed, "shares", epoch, source)
    offset = name_to_int(seed, "offset", epoch, source) % samples
    passed = (np.cumsum(remainders[shuffle]) + offset) // samples
    shares[shuffle] += np.diff(passed, prepend=0)
    return shares


def _starts(sizes: np.ndarray) -> np.ndarray:
    """[n] sizes -> int64 [n + 1] running sums that begin with 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _permutation(size: int, *name: int | str) -> np.ndarray:
    """The random permutation of `size` things that has this name."""
    words = np.random.Philox(key=name_to_int(*name)).random_raw(size)
    return np.argsort(words, kind="stable")


def _coprime_near(value: float, number: int) -> int:
    stride = max(1, int(value))
    while math.gcd(stride, number) != 1:
        stride += 1
    return stride
