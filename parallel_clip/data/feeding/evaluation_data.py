"""Held-out pictures in the order of their shards, with all captions or with their class."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from parallel_clip.data.feeding.sample_records import BadSample, StoredAddress
from parallel_clip.data.feeding.workers import read_ahead, report_progress
from parallel_clip.data.index.shard_table import ShardTable
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import (
    MAX_PIXELS,
    PictureRule,
    decode_picture,
    label_of,
)
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import (
    Preprocess,
    evaluation_resized,
    evaluation_transform,
)
from parallel_clip.data.storage.addresses import without_signature
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles


@dataclass(frozen=True)
class EvaluationBatch:
    """n pictures on the CPU, with the m captions of all of them or with the label of each.

    Bad samples are left out and listed in `bad`: n may be smaller than asked for, or 0.
    """

    images: Tensor  # uint8 [n, 3, H, W], which `normalize` takes
    positions: Tensor  # int64 [n]: number of the sample among all of the shards
    tokens: Tensor  # int64 [m, L]; m is 0 where labels were asked for
    owner: Tensor  # int64 [m]: the row of `images` that a caption belongs to, ascending
    labels: Tensor  # int64 [n]; [0] where captions were asked for
    addresses: list[StoredAddress]  # of the n pictures
    bad: list[BadSample]


@dataclass
class EvaluationData:
    """The part of one of `ranks` of the samples of shards, in batches of `batch` pictures.

    Parts are contiguous and follow one another in the order of ranks. A sample without a picture
    or without what is needed beside it is a bad one. May be iterated more than once; each time
    `workers` processes decode (0: this one), and `patience` is as in `read_ahead`.
    """

    shards: ShardTable
    preprocess: Preprocess
    tokenizer: Tokenizer
    _: KW_ONLY
    need: Literal["captions", "labels"] = "captions"
    captions: CaptionRule = CaptionRule()
    max_pixels: int = MAX_PIXELS
    batch: int = 64
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    patience: float = 25.0

    def __post_init__(self) -> None:
        self.samples = n = self.shards.samples  # over all ranks, bad ones included
        self._part = range(n * self.rank // self.ranks, n * (self.rank + 1) // self.ranks)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.shards.counts)])
        self._shard = lru_cache(1)(self.shards.__getitem__)  # samples of one follow one another
        self._transform = evaluation_transform(self.preprocess, normalized=False)
        self._pictures = PictureRule(self.max_pixels, resized=evaluation_resized(self.preprocess))
        self._files = ShardFiles()

    def __len__(self) -> int:
        return -(-len(self._part) // self.batch)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        starts = range(0, len(self._part), self.batch)
        batches = (self._part[start : start + self.batch] for start in starts)
        return read_ahead(self, batches, self.workers, prefetch=2, patience=self.patience)

    def _no_images(self) -> Tensor:
        return torch.empty(0, 3, *self.preprocess.image_size, dtype=torch.uint8)

    def describe_position(self, shard: int, index: int, *_: int) -> str:
        return f"sample {index} of {self.shards.paths[shard]}"

    def __getitem__(self, positions: range) -> EvaluationBatch:
        """The samples at `positions` among those of all shards: what a worker reads."""
        images, used, captions, owner, labels, addresses, bad = [], [], [], [], [], [], []
        for position in positions:
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            index = position - int(self._starts[number])
            report_progress(number, index)
            shard = self._shard(number)
            where = without_signature(shard.path)
            try:
                sample = self._files.read(shard, index)
                picture = decode_picture(sample, self._pictures)
                if self.need == "captions":
                    own = self.captions.captions_of(sample)
                    captions += own
                    owner += [len(images)] * len(own)
                else:
                    labels.append(label_of(sample))
            except BadSampleError as error:
                bad.append(BadSample(position, 0, where, error.key, error.reason))
                continue
            images.append(self._transform(picture))
            used.append(position)
            addresses.append(StoredAddress(0, where, sample.key))
        return EvaluationBatch(
            torch.stack(images) if images else self._no_images(),
            torch.tensor(used, dtype=torch.int64),
            self.tokenizer(captions),
            torch.tensor(owner, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            addresses,
            bad,
        )
