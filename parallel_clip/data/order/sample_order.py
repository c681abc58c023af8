"""The order of the samples of a run: a pure function of (seed, size of a batch, position).

A position counts from the begin of the run, a place from that of its epoch. An epoch is put
together in four steps, each of which is computed for single places, so that memory is one integer a
shard and starting takes no time, however many samples there are:

1. All samples of the epoch in a row: each source's, shard after shard, as often as its weight says,
   then those that its weight's fraction chooses this time.
2. The row is cut into blocks of consecutive samples, and the blocks are permuted.
3. What results is cut into streams. Every batch takes its first positions from the first stream, as
   many next ones from the second, and so on to the last: the same number of each stream in every
   batch, also in one that spans two epochs. So neighbours in a batch come from streams far apart,
   and a machine whose ranks take the same part of every batch reads the same few streams
   throughout, and nearly nothing that another machine reads.
4. A stream is cut into windows, and the samples of a window are permuted. So all streams together
   read from `SHUFFLED / SHUFFLE_BLOCK` stretches of shards at a time.

Positions run on from epoch to epoch; nothing here knows of ranks, workers or microbatches, and
resuming a run is knowing one integer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel_clip.data.order.permutation import key_of, name_to_int, permuted, subkey
from parallel_clip.errors import InputError

# The order's definition: other values are another order, and a resumed run would not match.
SHUFFLE_BLOCK = 128  # consecutive samples of a shard that stay near one another
MAX_STREAMS = 1536  # 3 x 512: many for each of 128 machines, and 24 or 96 share none either
LEAST_STREAM = 1024  # samples of a stream, where an epoch has several
SHUFFLED = 2**20  # samples in the windows of all streams together
VERSION = 3  # of all that follows; a checkpoint notes it


@dataclass(frozen=True)
class OrderSource:
    """A source of samples: their number in each shard, how often an epoch has each (`weight`, 0 for
    a source that is left out), and how many of the first are used (`samples`; None: all)."""

    shard_samples: Sequence[int] | np.ndarray
    weight: float = 1.0
    samples: int | None = None


class SampleAddress(NamedTuple):
    """Where a sample is: source, shard in the source, sample in the shard; each counts from 0."""

    source: int
    shard: int
    index: int
    epoch: int


class Addresses(NamedTuple):
    """`SampleAddress` of n samples, int64 [n] each."""

    source: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    epoch: np.ndarray


class Order:
    """The order of all samples of a run. Memory: one integer a shard.

    batch: positions of a global batch; that which a run began with, for the order depends on it.
    """

    def __init__(self, sources: Sequence[OrderSource], seed: int, batch: int):
        self.seed = seed
        self.batch = batch
        self._parts = [SourceEpoch.of(source, number) for number, source in enumerate(sources)]
        self.source_samples = [part.samples_per_epoch for part in self._parts]
        self._part_ends = np.cumsum(self.source_samples)
        self.samples_per_epoch = int(sum(self.source_samples))
        if self.samples_per_epoch == 0:
            raise InputError(
                f"an epoch has no samples: the sources hold {[p.samples for p in self._parts]} at "
                f"weights {[source.weight for source in sources]}; raise a weight, or `samples` of "
                "a source"
            )
        self.streams = stream_count(self.samples_per_epoch, batch)
        self._stride = max(1, int(0.618 * self.samples_per_epoch))
        while math.gcd(self._stride, self.samples_per_epoch) != 1:  # see `substitute`
            self._stride += 1

    def at(self, position: int) -> SampleAddress:
        """The sample at `position` (from 0, running on over epochs)."""
        found = self.of_positions(np.array([position]))
        return SampleAddress(*(int(part[0]) for part in found))

    def of_positions(self, positions: np.ndarray) -> Addresses:
        """The samples at many positions, int64 [n]."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, self.samples_per_epoch)
        source, shard, index = (np.empty_like(positions) for _ in range(3))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            row = self._row(int(epoch), places[here])
            source[here], shard[here], index[here] = self._samples(int(epoch), row)
        return Addresses(source, shard, index, epochs)

    def substitute(self, position: int, attempt: int) -> int:
        """The position whose sample stands in for a bad one at `position`, at try 1, 2, ...

        In the same epoch, far from `position`, and different at every try below
        `samples_per_epoch`.
        """
        epoch, place = divmod(position, self.samples_per_epoch)
        place = (place + attempt * self._stride) % self.samples_per_epoch
        return epoch * self.samples_per_epoch + place

    def _row(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Places in an epoch -> places in the row of all its samples: steps 4, 3 and 2."""
        streams = EpochStreams(
            self.streams, self.batch, epoch * self.samples_per_epoch, self.samples_per_epoch
        )
        stream, within = streams.of_places(places)
        window, start, size = streams.windows(stream, within)
        keys = subkey(subkey(key_of(self.seed, "window", epoch), stream), window)
        within = start + permuted(within - start, size, keys)
        blocks = streams.starts(stream) + within
        return _by_blocks(blocks, self.samples_per_epoch, SHUFFLE_BLOCK, self.seed, "blocks", epoch)

    def _samples(self, epoch: int, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in the row of all samples -> (source, shard, index): step 1."""
        source = np.searchsorted(self._part_ends, row, side="right")
        shard, index = np.empty_like(row), np.empty_like(row)
        for number in np.unique(source):
            here, part = source == number, self._parts[number]
            first = int(self._part_ends[number]) - part.samples_per_epoch
            shard[here], index[here] = part.find(row[here] - first, self.seed, epoch)
        return source, shard, index


@dataclass(frozen=True)
class SourceEpoch:
    """A source's part of an epoch: each sample `copies` times, and `extra` of them once more."""

    number: int
    starts: np.ndarray  # int64 [shards + 1], of each shard among the samples of the source
    copies: int
    extra: int

    @classmethod
    def of(cls, source: OrderSource, number: int) -> "SourceEpoch":
        sizes = np.asarray(source.shard_samples, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        if source.samples is not None:
            starts = np.minimum(starts, source.samples)
        samples, copies = int(starts[-1]), math.floor(source.weight)
        return cls(number, starts, copies, round(source.weight * samples) - copies * samples)

    @property
    def samples(self) -> int:
        return int(self.starts[-1])

    @property
    def samples_per_epoch(self) -> int:
        return self.copies * self.samples + self.extra

    def find(self, places: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index in it) of places among this part's samples of an epoch."""
        copy, sample = np.divmod(places, self.samples)
        chosen = copy == self.copies  # by the fraction: the first of a permutation of the epoch's
        if chosen.any():
            block = min(SHUFFLE_BLOCK, max(1, self.extra // SHUFFLE_BLOCK))
            sample[chosen] = _by_blocks(
                sample[chosen], self.samples, block, seed, "fraction", epoch, self.number
            )
        shard = np.searchsorted(self.starts, sample, side="right") - 1
        return shard, sample - self.starts[shard]


def stream_count(samples: int, batch: int) -> int:
    """The streams of an epoch of `samples`: `MAX_STREAMS`, or that halved until each has
    `LEAST_STREAM` and is in every batch."""
    most = max(1, min(samples // LEAST_STREAM, batch))
    streams = MAX_STREAMS
    while streams > most:
        streams //= 2
    return streams


@dataclass(frozen=True)
class EpochStreams:
    """How the places of an epoch are assigned to streams. The epoch has the positions [first,
    first + samples); of each batch, stream s has the positions `edges(s)` to `edges(s + 1)`."""

    streams: int
    batch: int
    first: int
    samples: int

    def edges(self, stream: np.ndarray) -> np.ndarray:
        """Where in a batch each stream begins: evenly, whatever divides the batch."""
        return stream * self.batch // self.streams

    def of_places(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each place, and its place in the stream."""
        position = self.first + places
        stream = ((position % self.batch + 1) * self.streams - 1) // self.batch
        return stream, self._count(position, stream) - self._count(self.first, stream)

    def starts(self, stream: np.ndarray) -> np.ndarray:
        """The places of all streams before each."""
        edge = self.edges(stream)
        return self._below(self.first + self.samples, edge) - self._below(self.first, edge)

    def windows(
        self, stream: np.ndarray, within: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The window of each place of a stream, and that window's start and size. A stream is cut
        evenly, so that no window is small."""
        length = self.starts(stream + 1) - self.starts(stream)
        size = SHUFFLED // self.streams
        count = np.maximum(1, (length + size // 2) // size)
        window = ((within + 1) * count - 1) // length
        start = window * length // count
        return window, start, (window + 1) * length // count - start

    def _count(self, positions: int | np.ndarray, stream: np.ndarray) -> np.ndarray:
        """How many of the first so many positions of the run are of a stream."""
        before, with_it = self.edges(stream), self.edges(stream + 1)
        return self._below(positions, with_it) - self._below(positions, before)

    def _below(self, positions: int | np.ndarray, edge: np.ndarray) -> np.ndarray:
        """How many of the first so many positions of the run stand before `edge` in a batch."""
        return positions // self.batch * edge + np.minimum(positions % self.batch, edge)


def _by_blocks(places: np.ndarray, size: int, block: int, *name: int | str) -> np.ndarray:
    """A permutation of range(size) that moves blocks of consecutive numbers as a whole.

    The cut into blocks begins at a random number and goes round, so that each epoch has others. The
    last block may be short; it stands at a random place among the others.
    """
    whole, short = divmod(size, block)
    key = key_of(*name)
    turn, at_block = name_to_int(*name, "turn") % size, name_to_int(*name, "short") % (whole + 1)
    first_of_short = at_block * block
    in_short = (places >= first_of_short) & (places < first_of_short + short)
    others = np.where(places < first_of_short, places, places - short)
    number, within = np.divmod(others, block)
    number[in_short] = 0  # any that there is
    cut = permuted(number, max(whole, 1), key) * block + within
    cut = np.where(in_short, whole * block + places - first_of_short, cut)
    return (cut + turn) % size
