"""Held-out pictures in the order of their shards, with all captions or with their class."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from parallel_clip.data.feeding.training_data import BadSample, StoredAddress
from parallel_clip.data.feeding.workers import read_ahead, report_progress
from parallel_clip.data.index.shard_table import ShardTable, index_shards
from parallel_clip.data.samples.decode import captions_of, decode_picture, label_of
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform
from parallel_clip.data.storage.progress import Print
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles, ShardIndex


@dataclass(frozen=True)
class EvaluationBatch:
    """n pictures on the CPU, with the m captions of all of them or with the label of each.

    Bad samples are left out and told of in `bad`: n may be smaller than asked for, or 0.
    """

    images: Tensor  # fp32 [n, 3, H, W]
    positions: Tensor  # int64 [n]: place among all samples of the shards
    tokens: Tensor  # int64 [m, L]; m is 0 where labels were asked for
    owner: Tensor  # int64 [m]: the row of `images` that a caption belongs to, ascending
    labels: Tensor  # int64 [n]; [0] where captions were asked for
    addresses: list[StoredAddress]  # of the n pictures
    bad: list[BadSample]


class EvaluationData:
    """This rank's part of the samples, a contiguous one, in batches; iterate as often as needed."""

    def __init__(self, data: "_EvaluationSamples", part: range, batch: int, workers: int):
        self._data = data
        self._part = part
        self._batch = batch
        self._workers = workers

    @property
    def samples(self) -> int:
        """Samples in the shards, over all ranks, bad ones included."""
        return len(self._data)

    def __len__(self) -> int:
        return -(-len(self._part) // self._batch)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        starts = range(0, len(self._part), self._batch)
        batches = (self._part[start : start + self._batch] for start in starts)
        return read_ahead(self._data, batches, self._workers, prefetch=2)


def open_evaluation_data(
    patterns: str | Sequence[str],
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    rank: int = 0,
    ranks: int = 1,
    batch: int = 64,
    need: Literal["captions", "labels"] = "captions",
    caption_key: str | None = None,
    workers: int = 0,
    say: Print = print,
    check: bool = True,
) -> EvaluationData:
    """The samples of shards, cut over `ranks`; with all their captions, or with their `.cls`.

    A sample without what is needed is a bad one. InputError: missing or broken shards, which are
    looked for unless `check` is False (see `index_shards`).
    """
    data = _EvaluationSamples(
        index_shards(patterns, say, check=check),
        preprocess,
        tokenizer,
        need == "captions",
        caption_key,
    )
    part = range(len(data) * rank // ranks, len(data) * (rank + 1) // ranks)
    return EvaluationData(data, part, batch, workers)


class _EvaluationSamples:
    def __init__(
        self,
        shards: ShardTable,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        with_captions: bool,
        caption_key: str | None,
    ):
        self._shards = shards
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(shards.counts)])
        self._size = preprocess.image_size
        self._transform = evaluation_transform(preprocess)
        self._tokenizer = tokenizer
        self._with_captions = with_captions
        self._caption_key = caption_key
        self._files = ShardFiles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def describe_position(self, shard: int, index: int, *_: int) -> str:
        return f"sample {index} of {self._shards.paths[shard]}"

    def __getitem__(self, positions: range) -> EvaluationBatch:
        images, used, captions, owner, labels, addresses, bad = [], [], [], [], [], [], []
        opened: tuple[int, ShardIndex] | None = None
        for position in positions:
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            index = position - int(self._starts[number])
            report_progress(number, index)
            if opened is None or opened[0] != number:
                opened = number, self._shards[number]
            shard = opened[1]
            try:
                sample = self._files.read(shard, index)
                picture = decode_picture(sample)
                if self._with_captions:
                    own = captions_of(sample, self._caption_key)
                    captions += own
                    owner += [len(images)] * len(own)
                else:
                    labels.append(label_of(sample))
            except BadSampleError as error:
                bad.append(BadSample(position, 0, shard.path, error.key, error.reason))
                continue
            images.append(self._transform(picture))
            used.append(position)
            addresses.append(StoredAddress(0, shard.path, sample.key))
        return EvaluationBatch(
            default_collate(images) if images else torch.empty(0, 3, *self._size),
            torch.tensor(used, dtype=torch.int64),
            self._tokenizer(captions),
            torch.tensor(owner, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            addresses,
            bad,
        )
