"""Open the data of a run: find its shards, check their first samples, build the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from parallel_clip.config import parse_bytes
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.index.shard_table import index_shards
from parallel_clip.data.order.sample_order import Order, OrderSource
from parallel_clip.data.samples.decode import captions_of, decode_picture, label_of
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import (
    Preprocess,
    evaluation_shrink,
    evaluation_transform,
    training_shrink,
    training_transform,
)
from parallel_clip.data.storage.progress import Print
from parallel_clip.data.storage.remote import RemoteCache
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles, ShardIndex
from parallel_clip.errors import InputError

if TYPE_CHECKING:
    from parallel_clip.config import Config


_FIRST = 64  # samples of which one must be good


@dataclass(frozen=True)
class BadItem:
    """A sample that cannot be used; a whole shard, or the rest of one, where `key` is None."""

    shard: str
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.reason}" if self.key is not None else self.reason


def check_first_samples(
    shards: Sequence[ShardIndex],
    need: Literal["captions", "labels"],
    caption_key: str | None = None,
) -> None:
    """See that the shards hold what is needed beside pictures: read until a sample is good.

    InputError: none of the first is. Shards of the wrong kind are found so before a run begins,
    where single bad samples are met, and counted, on its way.
    """
    files, first, tried = ShardFiles(), None, 0
    samples = ((shard, index) for shard in shards for index in range(shard.samples))
    for shard, index in islice(samples, _FIRST):
        tried += 1
        try:
            sample = files.read(shard, index)
            decode_picture(sample)
            if need == "captions":
                captions_of(sample, caption_key)
            else:
                label_of(sample)
        except BadSampleError as error:
            first = first or BadItem(shard.path, error.key, error.reason)
        except OSError as error:
            raise InputError(f"{shard.path} cannot be read: {error}") from None
        else:
            return
    wanted = {
        "captions": "a caption, in its .txt or at data.caption_key of its .json",
        "labels": "the number of its class, in its .cls",
    }
    raise InputError(
        f"none of the first {tried:,} samples can be used: {first} (the first of them); "
        f"a sample needs a picture and {wanted[need]}"
    )


def open_training_data(
    config: Config,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    say: Print = print,
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
            OrderSource(shards.counts, source.weight, source.samples)
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
        cache=RemoteCache(parse_bytes(settings.cache, "data.cache")),
    )
