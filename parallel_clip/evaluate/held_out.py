"""What `evaluate.*` asks for during training: loss, recall and accuracy on held-out shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from parallel_clip.config import Config
from parallel_clip.data.feeding.evaluation_data import EvaluationData, open_evaluation_data
from parallel_clip.data.feeding.open import check_first_samples
from parallel_clip.data.index.shard_table import ShardTable, index_shards
from parallel_clip.engine.groups import Groups
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.pairs import PairFeatures, encode_pairs
from parallel_clip.evaluate.prompts import read_classes, read_templates
from parallel_clip.evaluate.retrieval import retrieval
from parallel_clip.evaluate.zero_shot import encode_classes, zero_shot
from parallel_clip.loss import ALONE, ClipLoss, SigLipLoss
from parallel_clip.pipeline.logit_parameters import read_logit_parameters

Print = Callable[[str], None]


def check_held_out(config: Config, say: Print) -> list[ShardTable]:
    """See that the held-out sets are there and of the right kind; their shards. Writes nothing.

    Raises:
        InputError: shards, classes or templates that are not there or not right.
    """
    wanted = config.evaluate
    sets = [(wanted.loss, "captions"), (wanted.retrieval, "captions")]
    if wanted.zero_shot is not None:
        read_classes(wanted.zero_shot.classes)
        read_templates(wanted.zero_shot.templates)
        sets.append((wanted.zero_shot.shards, "labels"))
    found = []
    for patterns, need in sets:
        if patterns is not None:
            shards = index_shards(patterns, say, save=False)
            check_first_samples(shards, need, config.data.caption_key)
            found.append(shards)
    return found


class HeldOutEvaluation:
    """The held-out sets of a run, opened and checked once before training begins.

    Raises:
        InputError: shards, classes or templates that are not there or not right.
    """

    def __init__(self, config: Config, encoder: ModelEncoder, groups: Groups, say: Print):
        self._config = config
        self._encoder = encoder
        self._groups = groups
        wanted = config.evaluate
        self._loss = self._open(wanted.loss, "captions", say)
        # One set for both is encoded once.
        same = wanted.retrieval == wanted.loss
        self._retrieval = self._loss if same else self._open(wanted.retrieval, "captions", say)
        self._zero_shot = None
        if wanted.zero_shot is not None:
            self._zero_shot = self._open(wanted.zero_shot.shards, "labels", say)
            self._classes = read_classes(wanted.zero_shot.classes)
            self._templates = read_templates(wanted.zero_shot.templates)

    def evaluate(self) -> dict[str, float | dict[str, float]]:
        """Called by all ranks; every data rank encodes its part. The same result on each."""
        encoder, group = self._encoder, self._groups.data
        batch = self._config.evaluate.batch
        results: dict[str, float | dict[str, float]] = {}
        if self._loss is not None:
            logit_scale, logit_bias = read_logit_parameters(encoder.chunks, self._groups.pipeline)
            pairs = encode_pairs(encoder, self._loss, batch, group)
            found = held_out_loss(
                pairs,
                self._config.loss.kind,
                logit_scale,
                logit_bias,
                batch,
            )
            results["loss"] = found["loss"]
        if self._retrieval is not None:
            if self._retrieval is not self._loss:
                pairs = encode_pairs(encoder, self._retrieval, batch, group)
            results["retrieval"] = retrieval(pairs)
        if self._zero_shot is not None:
            classes = encode_classes(encoder, self._classes, self._templates, batch, group)
            results["zero_shot"] = zero_shot(encoder, self._zero_shot, classes, group)
        return results

    def _open(self, shards: str | list[str] | None, need: str, say: Print) -> EvaluationData | None:
        if shards is None:
            return None
        return open_evaluation_data(
            shards,
            self._encoder.preprocess,
            self._encoder.tokenizer,
            rank=self._groups.data_rank,
            ranks=self._groups.layout.data,
            batch=self._config.evaluate.batch,
            need=need,
            caption_key=self._config.data.caption_key,
            say=say,
            check=False,
        )


def held_out_loss(
    features: PairFeatures,
    kind: Literal["infonce", "sigmoid"],
    logit_scale: float,
    logit_bias: float | None = None,
    batch: int = 64,
) -> dict[str, float | int]:
    """The mean loss over batches of `batch` pictures, each with its first caption.

    A contrastive loss grows with its batch, so all batches are equally large: the pictures left
    over at the end are not used, and fewer pictures than a batch are one batch of their own.
    `logit_scale` is the multiplier itself. Returns `loss`, the `batch` it is of, and the number of
    `pairs` it was taken over. Features are the same on every rank, and so is the loss.
    """
    images, texts = features.images, features.first_captions()
    batch = min(batch, len(images))
    batches = len(images) // batch
    loss = (ClipLoss if kind == "infonce" else SigLipLoss)(group=ALONE)
    with torch.no_grad():
        losses = [
            loss(
                images[start : start + batch], texts[start : start + batch], logit_scale, logit_bias
            )
            for start in range(0, batches * batch, batch)
        ]
    return {
        "loss": torch.stack(losses).mean().item(),
        "batch": batch,
        "pairs": batches * batch,
    }
