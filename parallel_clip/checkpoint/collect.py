"""Collect a rank's pieces of fp32 masters and Adam's moments into host memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_clip.checkpoint.pieces import KINDS, Piece, host_copy
from parallel_clip.engine.groups import Groups
from parallel_clip.model.parameters import Parameter
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.adamw import MegatronAdamW
from parallel_clip.optimizer.train_state import TrainState


def collect_pieces(state: TrainState, groups: Groups) -> Iterator[Piece]:
    """The pieces that this rank writes, each collected when it is asked for. Called by all ranks.

    Each tensor is gathered over its data-parallel group onto one rank, another for each tensor, so
    that they share the writing. A tensor that all tensor ranks hold is written by the first; each
    stage of a pipeline writes its own. A frozen tensor has no moments.
    """
    for number, (parameter, tensor) in enumerate(state.global_parameters()):
        if parameter.placement.axis is None and groups.tensor_rank != 0:
            continue
        to = number % groups.layout.data  # as in FrozenWeights
        if tensor.requires_grad:
            values = _gather_state(tensor, state.optimizer, groups, to)
        else:
            values = state.frozen_weights.value(tensor)[None] if groups.data_rank == to else None
        if values is not None:
            yield from _cut(parameter, values, groups)


def _gather_state(
    tensor: nn.Parameter, optimizer: MegatronAdamW, groups: Groups, to: int
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


def _cut(parameter: Parameter, state: Tensor, groups: Groups) -> Iterator[Piece]:
    """The pieces of `state` [3, *local shape], this tensor rank's part of a tensor; [1, ...] where
    it has a weight alone."""
    axis = parameter.placement.axis
    for kind, values in zip(KINDS, state, strict=False):
        key = f"{kind}:{parameter.name}"
        if axis is None:
            yield Piece(key, host_copy(values), parameter.shape)
            continue
        for segment in parameter.placement.segments(
            parameter.shape[axis], groups.tensor_rank, groups.layout.tensor
        ):
            if segment.length:
                part = values.narrow(axis, segment.local, segment.length)
                yield Piece(key, host_copy(part), parameter.shape, axis, segment.whole)
