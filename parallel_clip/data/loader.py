"""From positions of the order to microbatches of tensors, read ahead by worker processes.

Everything about a batch but its cut into ranks and microbatches follows from the seed and the
positions, so any number of ranks, workers and microbatches gives the same bits.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from parallel_clip.config import bytes_in
from parallel_clip.data.decode import captions_of, decode_picture
from parallel_clip.data.files import OpenFiles
from parallel_clip.data.index import ShardTable, index_shards
from parallel_clip.data.order import VERSION as ORDER_VERSION
from parallel_clip.data.order import Order, SampleAddress, Source
from parallel_clip.data.progress import Say
from parallel_clip.data.remote import RemoteCache
from parallel_clip.data.shards import BadSampleError, ShardFiles, ShardIndex
from parallel_clip.data.tokenizer import Tokenizer
from parallel_clip.data.transforms import (
    Preprocess,
    Shrink,
    Transform,
    evaluation_shrink,
    evaluation_transform,
    sample_seed,
    seeded,
    training_shrink,
    training_transform,
)
from parallel_clip.data.workers import getting_on, read_ahead, still_trying
from parallel_clip.errors import BadDataError, InputError

if TYPE_CHECKING:
    from parallel_clip.config import Config

MAX_PIECE = 256  # samples one worker decodes at a time; larger microbatches are joined of these
TRIES = 64  # samples tried in place of a bad one
RECENT_SHARDS = 1024  # whose samples' places a worker keeps at hand: 80 KB each at 10,000 samples


class StoredAddress(NamedTuple):
    """Where a sample lies: number of its source, path of its shard, key therein."""

    source: int
    shard: str
    key: str


class BadSample(NamedTuple):
    """A sample that could not be used at a position of the order, and why."""

    position: int
    source: int
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.key} of {self.shard} (position {self.position}): {self.reason}"


@dataclass(frozen=True)
class Microbatch:
    """b pairs on the CPU. `addresses` says what was read at each position: its own sample, or the
    substitute where `bad` tells of it."""

    images: Tensor  # fp32 [b, 3, H, W]
    tokens: Tensor  # int64 [b, L]
    positions: Tensor  # int64 [b]
    addresses: list[StoredAddress]
    bad: list[BadSample]

    def pin_memory(self) -> "Microbatch":
        """The same in page-locked memory, from where copies to a GPU can overlap with its work."""
        return replace(
            self,
            images=self.images.pin_memory(),
            tokens=self.tokens.pin_memory(),
            positions=self.positions.pin_memory(),
        )


@dataclass(frozen=True)
class StepSlice:
    """Which part of every global batch a data-parallel rank reads, and in what portions."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    ranks: int = 1

    def microbatches(self, step: int) -> list[range]:
        """The positions of each microbatch of step `step` (from 0)."""
        per_rank = self.global_batch // self.ranks
        first = step * self.global_batch + self.rank * per_rank
        starts = range(first, first + per_rank, self.micro_batch)
        return [range(start, start + self.micro_batch) for start in starts]


class TrainingData:
    """All training pairs, by ranges of positions: `data[range(0, 8)]` is a Microbatch of 8.

    caption_keys: of each source; shrink: how far a picture may be shrunk while it is decoded, None:
    not at all.
    """

    def __init__(
        self,
        sources: Sequence[ShardTable],
        order: Order,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        any_caption: bool,
        caption_keys: Sequence[str | None],
        shrink: Shrink | None = None,
        cache: RemoteCache | None = None,
    ):
        self.order = order
        self.sources = sources
        self._transform = transform
        self._tokenizer = tokenizer
        self._any_caption = any_caption
        self._caption_keys = caption_keys
        self._shrink = shrink
        cache = cache or RemoteCache()
        cache.on_try = still_trying
        self._files = ShardFiles(OpenFiles(cache=cache))
        self._shards = _RecentShards(sources)

    @property
    def samples_per_epoch(self) -> int:
        return self.order.samples_per_epoch

    @property
    def made_of(self) -> dict[str, Any]:
        """What the order follows from, beside the config: a run goes on where this is alike."""
        sources = [
            {
                "shards": len(shards),
                "samples": shards.samples,
                "checksum": zlib.crc32(shards.counts.tobytes()),
            }
            for shards in self.sources
        ]
        return {"order": ORDER_VERSION, "sources": sources}

    def __getitem__(self, positions: range) -> Microbatch:
        """Read the pairs at `positions`; BadDataError where no substitute of a bad one is good."""
        found = self.order.of_positions(np.arange(positions.start, positions.stop))
        addresses = [SampleAddress(*map(int, address)) for address in zip(*found, strict=True)]
        pairs = map(self._pair, positions, addresses)
        images, captions, stored, bad = zip(*pairs, strict=True)
        return Microbatch(
            default_collate(images),  # in a worker straight into the memory that it shares
            self._tokenizer(captions),
            torch.tensor(positions),
            list(stored),
            [sample for sample in bad if sample is not None],
        )

    def place(self, source: int, shard: int, index: int) -> str:
        """In words, for people."""
        return f"sample {index} of {self.sources[source].paths[shard]}"

    def _pair(
        self, position: int, address: SampleAddress
    ) -> tuple[Tensor, str, StoredAddress, BadSample | None]:
        bad = None
        for attempt in range(TRIES + 1):
            if attempt:
                address = self.order.at(self.order.substitute(position, attempt))
            getting_on(address.source, address.shard, address.index)
            shard = self._shards.get(address.source, address.shard)
            try:
                sample = self._files.read(shard, address.index)
                captions = captions_of(sample, self._caption_keys[address.source])
                picture = decode_picture(sample, self._shrink)
            except BadSampleError as error:
                bad = bad or BadSample(
                    position, address.source, shard.path, error.key, error.reason
                )
                continue
            with seeded(sample_seed(self.order.seed, position, "augment")):
                image = self._transform(picture)
            choice = sample_seed(self.order.seed, position, "caption") if self._any_caption else 0
            stored = StoredAddress(address.source, shard.path, sample.key)
            return image, captions[choice % len(captions)], stored, bad
        raise BadDataError(
            f"{bad}; the {TRIES} samples tried in its place are bad too; "
            "parallel-clip data check names all that are"
        )


class _RecentShards:
    """Where the samples are of the shards last read from."""

    def __init__(self, sources: Sequence[ShardTable]):
        self._sources = sources
        self._found: OrderedDict[tuple[int, int], ShardIndex] = OrderedDict()

    def get(self, source: int, shard: int) -> ShardIndex:
        key = source, shard
        if key in self._found:
            self._found.move_to_end(key)
        else:
            self._found[key] = self._sources[source][shard]
            if len(self._found) > RECENT_SHARDS:
                self._found.popitem(last=False)
        return self._found[key]


class TrainingLoader:
    """The microbatches of steps [first_step, steps), for one data-parallel rank.

    Iterating starts the workers, which read ahead until the iterator is dropped; it yields a step's
    list of microbatches at a time. Takes nothing from torch's global generator.
    """

    def __init__(
        self,
        data: TrainingData,
        step_slice: StepSlice,
        first_step: int,
        steps: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        patience: float = 25.0,
    ):
        self.data = data
        self.step_slice = step_slice
        self.first_step = first_step
        self.steps = steps
        self._workers = workers
        self._prefetch = prefetch
        self._patience = patience

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Microbatch]]:
        pin = torch.cuda.is_available()
        steps = range(self.first_step, self.steps)
        ranges = (
            piece
            for step in steps
            for positions in self.step_slice.microbatches(step)
            for piece in _pieces(positions)
        )
        pieces = read_ahead(self.data, ranges, self._workers, self._prefetch, pin, self._patience)
        for step in steps:
            yield [
                _join([next(pieces) for _ in _pieces(positions)], pin)
                for positions in self.step_slice.microbatches(step)
            ]


def open_training_data(
    config: "Config",
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    say: Say = print,
    *,
    check: bool = True,
    save_index: bool = True,
    counts_suffice: bool = False,
) -> TrainingData:
    """The training data of a run; shards without an index get one, kept unless `save_index` is
    False (see `index_shards`, for `check` and `counts_suffice` too).

    InputError: no shards, missing or broken ones, an augmentation that there is not.
    """
    settings = config.data
    if not settings.train:
        raise InputError("data.train names no shards; give a list of {shards: ...}")
    augment = settings.augment == "train"
    if augment:
        transform = training_transform(preprocess, settings.augment_options)
        shrink = training_shrink(preprocess, settings.augment_options)
    else:
        transform, shrink = evaluation_transform(preprocess), evaluation_shrink(preprocess)
    sources = [
        index_shards(
            source.shards, say, check=check, save=save_index, counts_suffice=counts_suffice
        )
        for source in settings.train
    ]
    order = Order(
        [
            Source(shards.counts, source.weight, source.samples)
            for source, shards in zip(settings.train, sources, strict=True)
        ],
        config.seed,
    )
    return TrainingData(
        sources,
        order,
        transform,
        tokenizer,
        any_caption=augment,
        caption_keys=[source.caption_key or settings.caption_key for source in settings.train],
        shrink=shrink if settings.decode == "fast" else None,
        cache=RemoteCache(bytes_in(settings.cache, "data.cache")),
    )


def _pieces(positions: range) -> list[range]:
    return [positions[start : start + MAX_PIECE] for start in range(0, len(positions), MAX_PIECE)]


def _join(pieces: list[Microbatch], pin: bool) -> Microbatch:
    if len(pieces) == 1:
        return pieces[0]
    joined = Microbatch(
        torch.cat([piece.images for piece in pieces]),
        torch.cat([piece.tokens for piece in pieces]),
        torch.cat([piece.positions for piece in pieces]),
        [address for piece in pieces for address in piece.addresses],
        [bad for piece in pieces for bad in piece.bad],
    )
    return joined.pin_memory() if pin else joined
