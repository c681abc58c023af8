"""Open the data of a run: its shards, then the data sets over them.

Rank 0 finds and checks all shards (`find_run_shards`, `check_samples`) and saves their index; the
other ranks open them by that index (`reopen_run_shards`). Order, length and fingerprint of a run
follow from the shards and the config alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from parallel_clip.config import parse_bytes
from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.index.shard_list import ListedShard, contents_checksum, list_shards
from parallel_clip.data.index.shard_table import (
    ShardTable,
    check_shards,
    find_checked_shards,
    open_shards,
    save_index,
)
from parallel_clip.data.order.sample_order import VERSION as ORDER_VERSION
from parallel_clip.data.order.sample_order import Order, OrderSource
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import PictureRule, decode_picture, label_of
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import (
    Preprocess,
    evaluation_resized,
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
    from parallel_clip.config import Config, Data

Need = Literal["captions", "labels"]

HELD_OUT_NEEDS: dict[str, Need] = {
    "loss": "captions",
    "retrieval": "captions",
    "zero_shot": "labels",
}

_FIRST_SAMPLES = 64  # of which one must be good


@dataclass(frozen=True)
class RunShards:
    """The shards that a config names, and the order in which training samples are taken."""

    train: list[ShardTable]  # of each entry of `data.train`
    held_out: dict[str, ShardTable]  # of the keys of HELD_OUT_NEEDS that `evaluate` has set
    order: Order

    def save_index(self, say: Print = print) -> None:
        """Save the index of what was scanned when the shards were found."""
        for table in (*self.train, *self.held_out.values()):
            save_index(table, say)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the order follows from beside the config, and what is in the shards, ready for JSON:
        a run may only be resumed, and ranks may only work together, where it is equal."""
        sources = [
            {
                "shards": len(table),
                "samples": table.samples,
                "checksum": zlib.crc32(table.counts.tobytes()),
                "contents": contents_checksum(list_shards([table])),
            }
            for table in self.train
        ]
        return {"order": ORDER_VERSION, "sources": sources}

    @property
    def listed(self) -> list[ListedShard]:
        """The shards of training, apart from where they lie."""
        return list_shards(self.train)


def find_run_shards(
    config: Config, say: Print = print, *, counts_suffice: bool = False
) -> RunShards:
    """Find and check all shards of a run, on rank 0 for all ranks. Writes nothing.

    Scans shards that no saved index has, which is said; counts_suffice: not those whose number of
    samples a `sizes.json` beside them has, which is enough where no sample is read.

    Raises:
        InputError: no shards, missing, changed or broken ones, an epoch without samples, or wrong
            settings of `data`.
    """
    settings = config.data
    if not settings.train:
        raise InputError("data.train names no shards; give a list of {shards: ...}")
    parse_bytes(settings.cache, "data.cache")

    return _run_shards(config, partial(find_checked_shards, say=say, counts_suffice=counts_suffice))


def reopen_run_shards(config: Config, *, check: bool = False) -> RunShards:
    """Find the shards of a run on another rank, after rank 0 has checked them and saved their
    index. Looks at no shard that has one.

    check: see that this machine has them all, each of its size; one rank of a machine does that.

    Raises:
        InputError: a shard is missing here, or cannot be read.
    """
    shards = _run_shards(config, open_shards)
    for table in (*shards.train, *shards.held_out.values()) if check else ():
        check_shards(table)
    return shards


def check_samples(config: Config, shards: RunShards) -> None:
    """`check_first_samples` of each source of training pairs and each held-out set."""
    settings = config.data
    for rule, table in zip(_caption_rules(settings), shards.train, strict=True):
        check_first_samples(table, "captions", rule, settings.max_pixels)
    for name, table in shards.held_out.items():
        rule = CaptionRule(settings.caption_key)
        check_first_samples(table, HELD_OUT_NEEDS[name], rule, settings.max_pixels)


def check_first_samples(
    shards: Sequence[ShardIndex], need: Need, captions: CaptionRule, max_pixels: int
) -> None:
    """Check that shards hold what is needed beside pictures: read samples until one is good.

    InputError: none of the first 64 is. This finds shards of the wrong kind before a run begins;
    single bad samples are counted when the run meets them.
    """
    files, first, tried = ShardFiles(), None, 0
    samples = ((shard, index) for shard in shards for index in range(shard.samples))
    for shard, index in islice(samples, _FIRST_SAMPLES):
        tried += 1
        try:
            sample = files.read(shard, index)
            decode_picture(sample, PictureRule(max_pixels))
            if need == "captions":
                captions.captions_of(sample)
            else:
                label_of(sample)
        except BadSampleError as error:
            first = first or f"{shard.path}, {error.key}: {error.reason}"
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


def build_training_data(
    config: Config, shards: RunShards, preprocess: Preprocess, tokenizer: Tokenizer
) -> TrainingData:
    """The training pairs of a run."""
    settings = config.data
    augment = settings.augment == "train"
    if augment:
        transform = training_transform(preprocess, settings.augment_options)
        shrink, resized = training_shrink(preprocess, settings.augment_options), None
    else:
        transform = evaluation_transform(preprocess)
        shrink, resized = evaluation_shrink(preprocess), evaluation_resized(preprocess)
    if settings.decode == "exact":
        shrink = None
    return TrainingData(
        shards.train,
        shards.order,
        transform,
        tokenizer,
        any_caption=augment,
        captions=_caption_rules(settings),
        pictures=PictureRule(settings.max_pixels, shrink, resized),
        cache=RemoteCache(parse_bytes(settings.cache, "data.cache")),
    )


def build_held_out_data(
    config: Config,
    shards: RunShards,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, EvaluationData]:
    """The part of data-parallel rank `rank` of each held-out set, by its name in `shards.held_out`;
    names that have the same table share one object."""
    built: dict[int, EvaluationData] = {}
    for name, table in shards.held_out.items():
        if id(table) not in built:
            built[id(table)] = EvaluationData(
                table,
                preprocess,
                tokenizer,
                need=HELD_OUT_NEEDS[name],
                captions=CaptionRule(config.data.caption_key),
                max_pixels=config.data.max_pixels,
                batch=config.evaluate.batch,
                rank=rank,
                ranks=ranks,
                workers=config.evaluate.workers,
                patience=config.data.worker_patience,
            )
    return {name: built[id(table)] for name, table in shards.held_out.items()}


def _caption_rules(settings: Data) -> list[CaptionRule]:
    """Of each source of training pairs."""
    return [
        CaptionRule(
            settings.caption_key if source.caption_key is None else source.caption_key,
            settings.caption_lines if source.caption_lines is None else source.caption_lines,
            keep_empty=settings.empty_caption == "keep",
        )
        for source in settings.train
    ]


def _run_shards(config: Config, find_table: Callable[..., ShardTable]) -> RunShards:
    """Find the shards of each source and held-out set; each folder's index is opened once, and the
    samples are put in order.

    find_table: `find_checked_shards` or `open_shards`.
    """
    find = partial(find_table, folders={})  # one dict for all
    train = [find(source.shards) for source in config.data.train]
    wanted, held_out = config.evaluate, {}
    if wanted.loss is not None:
        held_out["loss"] = find(wanted.loss)
    if wanted.retrieval is not None:  # one set for both is encoded once
        same = wanted.retrieval == wanted.loss
        held_out["retrieval"] = held_out["loss"] if same else find(wanted.retrieval)
    if wanted.zero_shot is not None:
        held_out["zero_shot"] = find(wanted.zero_shot.shards)
    sources = [
        OrderSource(table.counts, source.weight, source.samples)
        for source, table in zip(config.data.train, train, strict=True)
    ]
    return RunShards(train, held_out, Order(sources, config.seed, config.batch.global_))
