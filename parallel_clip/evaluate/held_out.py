"""What `evaluate.*` asks for during training: loss, recall and accuracy on held-out shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from parallel_clip.config.keys import ZeroShot
from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.engine.groups import Groups
from parallel_clip.evaluate.encoder import ModelEncoder
from parallel_clip.evaluate.interrupt import Iterate
from parallel_clip.evaluate.prompts import read_classes, read_templates
from parallel_clip.evaluate.retrieval import PairFeatures, encode_pairs, retrieval
from parallel_clip.evaluate.zero_shot import encode_classes, zero_shot
from parallel_clip.loss import ALONE, ClipLoss, SigLipLoss
from parallel_clip.pipeline.logit_parameters import read_logit_parameters

LossKind = Literal["infonce", "sigmoid"]


@dataclass(frozen=True)
class ClassPrompts:
    """What zero-shot classification compares pictures with: each name in each template."""

    names: Sequence[str]
    templates: Sequence[str]


def read_class_prompts(settings: ZeroShot | None) -> ClassPrompts | None:
    """Read the files that `evaluate.zero_shot` names. InputError: not there, or not right."""
    if settings is None:
        return None
    return ClassPrompts(read_classes(settings.classes), read_templates(settings.templates))


@dataclass(frozen=True)
class HeldOutEvaluation:
    """The held-out sets of a run with the model that is trained.

    data: by the key of `evaluate` that names them (see `build_held_out_data`); prompts: for the set
    "zero_shot"; batch: pictures or texts that are encoded at once, and the batch of the loss.
    """

    data: Mapping[str, EvaluationData]
    prompts: ClassPrompts | None
    encoder: ModelEncoder
    groups: Groups
    loss_kind: LossKind
    batch: int

    def evaluate(self, iterate: Iterate = iter) -> dict[str, float | dict[str, float]]:
        """Called by all ranks; every data rank encodes its part. The same result on each.

        iterate: see `InterruptibleBatches`; what it raises is raised.
        """
        encoder, group, batch = self.encoder, self.groups.data, self.batch
        loss, retrieved, labelled = map(self.data.get, ("loss", "retrieval", "zero_shot"))
        results: dict[str, float | dict[str, float]] = {}
        if loss is not None:
            logit_scale, logit_bias = read_logit_parameters(encoder.chunks, self.groups.pipeline)
            pairs = encode_pairs(encoder, loss, batch, group, iterate)
            found = held_out_loss(pairs, self.loss_kind, logit_scale, logit_bias, batch)
            results["loss"] = found["loss"]
        if retrieved is not None:
            if retrieved is not loss:  # one set for both is encoded once
                pairs = encode_pairs(encoder, retrieved, batch, group, iterate)
            results["retrieval"] = retrieval(pairs)
        if labelled is not None:
            classes = encode_classes(
                encoder, self.prompts.names, self.prompts.templates, batch, group, iterate
            )
            results["zero_shot"] = zero_shot(encoder, labelled, classes, group, iterate)
        return results


@torch.no_grad()
def held_out_loss(
    features: PairFeatures,
    kind: LossKind,
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
    losses = [
        loss(images[start : start + batch], texts[start : start + batch], logit_scale, logit_bias)
        for start in range(0, batches * batch, batch)
    ]
    return {"loss": torch.stack(losses).mean().item(), "batch": batch, "pairs": batches * batch}
