"""From positions of the order to microbatches of tensors, read ahead by worker processes.

Everything about a batch but its cut into ranks and microbatches follows from the seed and the
positions, so any number of ranks, workers and microbatches gives the same bits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parallel_clip.data.decode import captions_of, decode_picture
from parallel_clip.data.index import Say, index_shards
from parallel_clip.data.order import Order, Source
from parallel_clip.data.shards import BadSampleError, ShardFiles, ShardIndex
from parallel_clip.data.tokenizer import Tokenizer
from parallel_clip.data.transforms import (
    Preprocess,
    Transform,
    evaluation_transform,
    sample_seed,
    seeded,
    training_transform,
)
from parallel_clip.errors import BadDataError, InputError

if TYPE_CHECKING:
    from parallel_clip.config import Config

MAX_PIECE = (
    256  # samples that one worker decodes at a time; larger microbatches are joined of these
)
TRIES = 64  # samples tried in place of a bad one


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
        return f"sample {self.key or '?'} of {self.shard} (position {self.position}): {self.reason}"


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


class TrainingData(Dataset):
    """All training pairs, by ranges of positions: `data[range(0, 8)]` is a Microbatch of 8."""

    def __init__(
        self,
        sources: Sequence[Sequence[ShardIndex]],
        order: Order,
        transform: Transform,
        tokenizer: Tokenizer,
        *,
        any_caption: bool,
        caption_key: str | None = None,
    ):
        self.order = order
        self._sources = sources
        self._transform = transform
        self._tokenizer = tokenizer
        self._any_caption = any_caption
        self._caption_key = caption_key
        self._files = ShardFiles()

    @property
    def shards(self) -> list[list[ShardIndex]]:
        """Of each source."""
        return [list(shards) for shards in self._sources]

    @property
    def samples_per_epoch(self) -> int:
        return self.order.samples_per_epoch

    def __getitem__(self, positions: range) -> Microbatch:
        """Read the pairs at `positions`; BadDataError where no substitute of a bad one is good."""
        images, captions, addresses, bad = zip(*map(self._pair, positions), strict=True)
        return Microbatch(
            torch.stack(images),
            self._tokenizer(captions),
            torch.tensor(positions),
            list(addresses),
            [sample for sample in bad if sample is not None],
        )

    def _pair(self, position: int) -> tuple[Tensor, str, StoredAddress, BadSample | None]:
        bad = None
        for attempt in range(TRIES + 1):
            place = self.order.substitute(position, attempt) if attempt else position
            address = self.order.at(place)
            shard = self._sources[address.source][address.shard]
            try:
                sample = self._files.read(shard, address.index)
                captions = captions_of(sample, self._caption_key)
                picture = decode_picture(sample)
            except BadSampleError as error:
                bad = bad or BadSample(
                    position, address.source, str(shard.path), error.key, error.reason
                )
                continue
            with seeded(sample_seed(self.order.seed, position, "augment")):
                image = self._transform(picture)
            choice = sample_seed(self.order.seed, position, "caption") if self._any_caption else 0
            stored = StoredAddress(address.source, str(shard.path), sample.key)
            return image, captions[choice % len(captions)], stored, bad
        raise BadDataError(
            f"{bad}; the {TRIES} samples tried in its place are bad too; "
            "parallel-clip data check names all that are"
        )


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
    ):
        self.data = data
        self.step_slice = step_slice
        self.first_step = first_step
        self.steps = steps
        self._workers = workers
        self._prefetch = prefetch

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
        pieces = read_ahead(self.data, ranges, self._workers, self._prefetch, pin)
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
    save_index: bool = True,
) -> TrainingData:
    """The training data of a run; shards without an index get one, kept unless `save_index` is
    False (see `index_shards`).

    InputError: no shards, missing or broken ones, an augmentation that there is not.
    """
    settings = config.data
    if not settings.train:
        raise InputError("data.train names no shards; give a list of {shards: ...}")
    augment = settings.augment == "train"
    if augment:
        transform = training_transform(preprocess, settings.augment_options)
    else:
        transform = evaluation_transform(preprocess)
    sources = [index_shards(source.shards, say, save=save_index) for source in settings.train]
    order = Order(
        [
            Source([shard.samples for shard in shards], source.weight, source.samples)
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
        caption_key=settings.caption_key,
    )


def read_ahead(
    data: Dataset, items: Iterable, workers: int, prefetch: int, pin: bool = False
) -> Iterator:
    """`data[item]` of each item in order, by `workers` processes (0: this one), each of which keeps
    `prefetch` of them ready; `pin`: in page-locked memory."""
    loader = DataLoader(
        _FailuresAsValues(data),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    for value in loader:
        if isinstance(value, BadDataError):
            raise value
        yield value


class _FailuresAsValues(Dataset):
    """Hands an error over as it is: a DataLoader would add a worker's traceback to its message."""

    def __init__(self, data: Dataset):
        self._data = data

    def __getitem__(self, item: object) -> object:
        try:
            return self._data[item]
        except BadDataError as error:
            return error


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


def _unchanged(value: object) -> object:
    return value
