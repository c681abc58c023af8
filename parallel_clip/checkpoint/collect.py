"""Collect a rank's pieces of weights, masters and moments from the devices."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_clip.checkpoint.pieces import KINDS, PieceWriter
from parallel_clip.engine.groups import Groups
from parallel_clip.model.parameters import Parameter
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.adamw import Optimizer


def _gather_state(
    tensor: nn.Parameter, optimizer: Optimizer, groups: Groups, to: int
) -> Tensor | None:
    """Master and moments of a rank's tensor, fp32 [3, *shape], on data rank `to`; elsewhere None.

    Zeros stand for moments before the first step.
    """
    own = optimizer.owned_state(tensor)
    state = torch.zeros(len(KINDS), tensor.numel(), device=tensor.device)
    if own is not None:
        state[0, own.start : own.stop] = own.master
        if own.moments is not None:
            for row, kind in enumerate(MOMENTS, start=1):
                state[row, own.start : own.stop] = own.moments[kind]
    if optimizer.splits_state and groups.layout.data > 1:
        # Each element has one owner, so the sum puts the parts together.
        dist.reduce(state, dist.get_global_rank(groups.data, to), group=groups.data)
    return state.view(len(KINDS), *tensor.shape) if groups.data_rank == to else None


def _add_pieces(writer: PieceWriter, parameter: Parameter, state: Tensor, groups: Groups) -> None:
    axis = parameter.placement.axis
    for kind, values in zip(KINDS, state, strict=True):
        key = f"{kind}:{parameter.name}"
        if axis is None:
            writer.add(key, values, parameter.shape, 0, 0)
            continue
        for segment in parameter.placement.segments(
            parameter.shape[axis], groups.tensor_rank, groups.layout.tensor
        ):
            if segment.length:
                piece = values.narrow(axis, segment.local, segment.length)
                writer.add(key, piece, parameter.shape, axis, segment.whole)
