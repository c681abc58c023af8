"""Collect a rank's pieces of fp32 masters, Adam's moments and averages into host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_clip.checkpoint.pieces import KINDS, Piece, host_copy
from parallel_clip.engine.groups import Groups
from parallel_clip.model.parameters import Parameter
from parallel_clip.optimizer import AVERAGE
from parallel_clip.optimizer.frozen_weights import writing_rank
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
        to, kinds = writing_rank(number, groups.layout.data), KINDS[:1]
        if tensor.requires_grad:
            kinds = KINDS if state.average is None else (*KINDS, AVERAGE)
            values = _gather_state(tensor, state, kinds, groups, to)
        else:
            values = state.frozen_weights.value(tensor)[None] if groups.data_rank == to else None
        if values is not None:
            yield from _cut(parameter, kinds, values, groups)


def _gather_state(
    tensor: nn.Parameter, state: TrainState, kinds: Sequence[str], groups: Groups, to: int
) -> Tensor | None:
    """Master, moments and average of a rank's tensor, fp32 [kinds, *shape], on data rank `to`;
    elsewhere None.

    Zeros stand for moments before the first step.
    """
    own = state.optimizer.owned_state(tensor)
    rows = torch.zeros(len(kinds), tensor.numel(), device=tensor.device)
    if own is not None:
        parts = {"weight": own.master} | (own.moments or {})
        if AVERAGE in kinds:
            parts[AVERAGE] = state.average.of(tensor)
        for row, kind in zip(rows, kinds, strict=True):
            if kind in parts:
                row[own.start : own.stop] = parts[kind]
    if state.optimizer.splits_state and groups.layout.data > 1:
        # Each element has one owner, so the sum puts the parts together.
        dist.reduce(rows, dist.get_global_rank(groups.data, to), group=groups.data)
    return rows.view(len(kinds), *tensor.shape) if groups.data_rank == to else None


def _cut(
    parameter: Parameter, kinds: Sequence[str], state: Tensor, groups: Groups
) -> Iterator[Piece]:
    """The pieces of `state` [kinds, *local shape], this tensor rank's part of a tensor."""
    axis = parameter.placement.axis
    for kind, values in zip(kinds, state, strict=True):
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
