"""What `evaluate.*` asks for during training: loss, recall and accuracy on held-out shards."""

from __future__ import annotations

from collections.abc import Callable

from parallel_clip.config import Config
from parallel_clip.data.check import require_usable
from parallel_clip.data.evaluation import EvaluationData, open_evaluation_data
from parallel_clip.data.index import ShardTable, index_shards
from parallel_clip.engine.groups import Groups
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.held_out_loss import held_out_loss
from parallel_clip.evaluate.pairs import encode_pairs
from parallel_clip.evaluate.prompts import read_classes, read_templates
from parallel_clip.evaluate.retrieval import retrieval
from parallel_clip.evaluate.zero_shot import encode_classes, zero_shot
from parallel_clip.pipeline.last_stage import read_logit_parameters

Say = Callable[[str], None]


def check_held_out(config: Config, say: Say) -> list[ShardTable]:
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
            require_usable(shards, need, config.data.caption_key)
            found.append(shards)
    return found


class HeldOut:
    """The held-out sets of a run, opened and checked once before training begins.

    Raises:
        InputError: shards, classes or templates that are not there or not right.
    """

    def __init__(self, config: Config, encoder: ModelEncoder, groups: Groups, say: Say):
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

    def _open(self, shards: str | list[str] | None, need: str, say: Say) -> EvaluationData | None:
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
