"""Open what the evaluate commands need: a checkpoint's encoder and the held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.feeding.open import Need, check_first_samples
from parallel_clip.data.index.shard_list import describe_differences, list_shards
from parallel_clip.data.index.shard_table import (
    ShardTable,
    find_checked_shards,
    open_shards,
    save_index,
)
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import MAX_PIXELS
from parallel_clip.data.storage.progress import Print, print_nothing
from parallel_clip.engine.device import host_name
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import ModelEncoder, load_encoder


def open_evaluation(
    checkpoint: str,
    patterns: str,
    groups: Groups,
    *,
    need: Need,
    batch: int = 64,
    workers: int = 4,
    caption_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
    model_name: str | None = None,
    override: Sequence[str] = (),
    tokenizer: str | None = None,
    precision: str = "fp32",
    ema: bool = False,
    say: Print = print,
) -> tuple[ModelEncoder, EvaluationData]:
    """The encoder of a checkpoint, and this data-parallel rank's part of the shards. Called by all
    ranks; rank 0 checks the shards and saves their index for the others.

    Raises:
        InputError: on every rank, as `load_encoder`, `find_checked_shards`, `check_first_samples`;
            or a rank has other shards.
    """
    encoder = groups.run_on_all_ranks(
        lambda: load_encoder(
            checkpoint,
            groups,
            model_name=model_name,
            override=override,
            tokenizer=tokenizer,
            precision=precision,
            ema=ema,
            say=say if groups.is_rank_zero else print_nothing,
        )
    )

    captions = CaptionRule(caption_key)

    def find_on_rank_zero() -> ShardTable | None:
        if not groups.is_rank_zero:
            return None
        table = find_checked_shards(patterns, say)
        check_first_samples(table, need, captions, max_pixels)
        save_index(table, say)
        return table

    checked = groups.run_on_all_ranks(find_on_rank_zero)
    listed = groups.run_on_rank_zero(lambda: list_shards([checked]))

    def open_the_same() -> ShardTable:
        table = open_shards(patterns) if checked is None else checked
        own = list_shards([table])
        if own != listed:
            raise InputError(
                f"rank {groups.rank} on {host_name()} has other shards than rank 0: "
                f"{describe_differences(listed, own)}; bring the same files to every machine"
            )
        return table

    table = groups.run_on_all_ranks(open_the_same)
    data = EvaluationData(
        table,
        encoder.preprocess,
        encoder.tokenizer,
        need=need,
        captions=captions,
        max_pixels=max_pixels,
        batch=batch,
        rank=groups.data_rank,
        ranks=groups.layout.data,
        workers=workers,
    )
    return encoder, data
