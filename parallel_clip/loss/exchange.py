"""How embeddings and losses pass between the data-parallel ranks, gradients included.

N ranks, b pairs on each, D the embedding width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def default_group() -> ProcessGroup | None:
    """The group of all processes; None in a process that runs alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def group_rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def gather_with_gradient(features: Tensor, group: ProcessGroup | None) -> Tensor:
    """[b, D] of each rank -> [N·b, D] on every rank, in the order of ranks.

    The gradient is summed over the ranks, since each rank's loss depends on every rank's features.
    """
    if group is None or group.size() == 1:
        return features
    return _Gather.apply(features, group)


def mean_over_ranks(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean of each rank's loss, with the gradient of this rank's own.

    The gradients of the global loss are then the mean over ranks of what backward gives on each,
    which is what DDP takes.
    """
    if group is None or group.size() == 1:
        return local
    mean = local.detach().clone()
    dist.all_reduce(mean, group=group)
    return local + (mean / group.size() - local.detach())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = features.new_empty(group.size() * features.shape[0], *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None
