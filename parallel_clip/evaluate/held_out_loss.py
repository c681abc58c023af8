"""The contrastive loss on pairs that training never sees."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.evaluate.pairs import PairFeatures


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
    losses = []
    for start in range(0, batches * batch, batch):
        pairs = slice(start, start + batch)
        logits = logit_scale * images[pairs] @ texts[pairs].T
        if logit_bias is not None:
            logits = logits + logit_bias
        losses.append(_infonce(logits) if kind == "infonce" else _sigmoid(logits))
    return {
        "loss": torch.stack(losses).mean().item(),
        "batch": batch,
        "pairs": batches * batch,
    }


def _infonce(logits: Tensor) -> Tensor:
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _sigmoid(logits: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)
