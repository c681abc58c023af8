"""The losses that benchmarks/loss.py compares, each as `loss(images, texts, scale, bias)`."""

from __future__ import annotations

from collections.abc import Callable

import open_clip.loss
import torch
from torch import Tensor, nn

from parallel_clip.loss import ClipLoss, SigLipLoss


def losses_of(
    rank: int, processes: int, pairs: int, width: int
) -> dict[str, Callable[..., Tensor]]:
    """By name; "stored" only at sizes at which ours does keep the logits."""
    theirs = open_clip.loss.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=rank, world_size=processes
    )
    losses = {
        "open_clip": lambda images, texts, scale, bias: theirs(images, texts, scale),
        "ring in torch": RingInTorch(rank, processes),
        "stored": ClipLoss(exchange="gather"),
        "tiled": ClipLoss(exchange="gather", tile=1024),
        "streamed": ClipLoss(exchange="ring"),
        "open_clip sigmoid": open_clip.loss.SigLipLoss(rank=rank, world_size=processes),
        "sigmoid": SigLipLoss(),
    }
    if not losses["stored"].plan(pairs, width).stored:
        del losses["stored"]
    return losses


class RingInTorch(nn.Module):
    """InfoNCE in both directions, the other side's features passed round a ring, in plain autograd:
    the shortest way to write a ring."""

    def __init__(self, rank: int, processes: int):
        super().__init__()
        self.left, self.right = (rank - 1) % processes, (rank + 1) % processes
        self.processes = processes

    def forward(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        one, other = self._direction(images, texts, scale), self._direction(texts, images, scale)
        return (one + other) / 2

    def _direction(self, own: Tensor, passing: Tensor, scale: Tensor) -> Tensor:
        blocks = []
        for hop in range(self.processes):
            blocks.append(scale * own @ passing.t())
            if hop < self.processes - 1:
                passing = open_clip.loss.neighbour_exchange_with_grad(
                    self.left, self.right, passing
                )
        partial = torch.stack([block.logsumexp(dim=1) for block in blocks])
        return (partial.logsumexp(dim=0) - blocks[0].diagonal()).mean()
