"""Open the data of a run over its shards: training pairs and held-out sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

from parallel_clip.config import training_sources
from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.feeding.run_shards import RunShards
from parallel_clip.data.feeding.training_data import TrainingData
from parallel_clip.data.order.run_order import ONE_ORDER, RunOrder, Stretch
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import PictureRule, decode_picture, label_of
from parallel_clip.data.samples.identities import IdentityRule
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import (
    Preprocess,
    evaluation_resized,
    evaluation_shrink,
    evaluation_transform,
    training_shrink,
    training_transform,
)
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles, ShardIndex
from parallel_clip.errors import InputError

if TYPE_CHECKING:
    from parallel_clip.config import Config

Need = Literal["captions", "labels"]

HELD_OUT_NEEDS: dict[str, Need] = {
    "loss": "captions",
    "retrieval": "captions",
    "zero_shot": "labels",
}

_FIRST_SAMPLES = 64  # of which one must be good


def check_samples(config: Config, shards: RunShards) -> None:
    """`check_first_samples` of each source of training pairs and each held-out set, and that a key
    named by `loss.duplicates` is there."""
    settings = config.data
    for rule, table in zip(_caption_rules(config), shards.train, strict=True):
        check_first_samples(table, "captions", rule, settings.max_pixels)
    for name, table in shards.held_out.items():
        rule = CaptionRule(settings.caption_key)
        check_first_samples(table, HELD_OUT_NEEDS[name], rule, settings.max_pixels)
    identity = IdentityRule.of(config.loss.duplicates)
    if identity is not None and identity.key is not None:
        _check_identity_key(shards.train, identity)


def _check_identity_key(sources: Sequence[Sequence[ShardIndex]], rule: IdentityRule) -> None:
    """InputError: none of the first samples of any source has a value at the rule's key."""
    files, tried = ShardFiles(), 0
    for shards in sources:
        for shard, index in _first_samples(shards):
            tried += 1
            try:
                if rule.value_of(files.read(shard, index)) is not None:
                    return
            except BadSampleError:
                continue
            except OSError as error:
                raise InputError(f"{shard.path} cannot be read: {error}") from None
    raise InputError(
        f"loss.duplicates key:{rule.key}: none of the first {tried:,} samples has a value at "
        f"{rule.key!r} of its .json; name a key that they have, or set loss.duplicates to tokens "
        "or none"
    )


def _first_samples(shards: Sequence[ShardIndex]) -> Iterator[tuple[ShardIndex, int]]:
    samples = ((shard, index) for shard in shards for index in range(shard.samples))
    return islice(samples, _FIRST_SAMPLES)


def check_first_samples(
    shards: Sequence[ShardIndex], need: Need, captions: CaptionRule, max_pixels: int
) -> None:
    """Check that shards hold what is needed beside pictures: read samples until one is good.

    InputError: none of the first 64 is. This finds shards of the wrong kind before a run begins;
    single bad samples are counted when the run meets them.
    """
    files, first, tried = ShardFiles(), None, 0
    for shard, index in _first_samples(shards):
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
    config: Config,
    shards: RunShards,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    stretches: Sequence[Stretch] = ONE_ORDER,
) -> TrainingData:
    """The training pairs of a run. stretches: which of the orders of `shards` its positions are
    of."""
    settings = config.data
    augment = settings.augment == "train"
    here = settings.normalize == "worker"
    if augment:
        transform = training_transform(preprocess, settings.augment_options, normalized=here)
        shrink, resized = training_shrink(preprocess, settings.augment_options), None
    else:
        transform = evaluation_transform(preprocess, normalized=here)
        shrink, resized = evaluation_shrink(preprocess), evaluation_resized(preprocess)
    if settings.decode == "exact":
        shrink = None
    return TrainingData(
        shards.train,
        RunOrder(shards.orders, stretches, config.seed),
        transform,
        tokenizer,
        any_caption=augment,
        captions=_caption_rules(config),
        pictures=PictureRule(settings.max_pixels, shrink, resized),
        identity=IdentityRule.of(config.loss.duplicates),
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
    workers = config.evaluate.workers
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
                workers=config.data.workers if workers is None else workers,
                patience=config.data.worker_patience,
            )
    return {name: built[id(table)] for name, table in shards.held_out.items()}


def _caption_rules(config: Config) -> list[CaptionRule]:
    """Of each source of training pairs."""
    settings = config.data
    return [
        CaptionRule(
            settings.caption_key if source.caption_key is None else source.caption_key,
            settings.caption_lines if source.caption_lines is None else source.caption_lines,
            keep_empty=settings.empty_caption == "keep",
        )
        for source in training_sources(config).sources
    ]
