"""Writing a checkpoint from all ranks of a layout.

Each tensor is gathered over its data-parallel group onto one rank, another for each tensor, so
that they share the writing. A tensor that all tensor ranks hold is written by the first; each stage
of a pipeline writes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import KINDS, PieceWriter, write_index
from parallel_clip.convert.names import Parameter
from parallel_clip.engine.groups import Groups
from parallel_clip.model.clip import CLIPModel, global_parameters


class StateOwner(Protocol):
    """The optimizer, as far as a checkpoint needs it: `training.optimizer.Optimizer`."""

    splits_state: bool

    def owned_state(self, tensor: nn.Parameter): ...

    def set_weight(self, tensor: nn.Parameter, value: Tensor) -> None: ...

    def set_moments(self, tensor: nn.Parameter, moments: dict[str, Tensor], step: int) -> None: ...


def save_checkpoint(
    run_dir: Path,
    meta: Meta,
    chunks: Sequence[CLIPModel],
    optimizer: StateOwner,
    groups: Groups,
    keep: int | None,
) -> Path:
    """Write, commit and prune; returns the checkpoint's folder. Called by all ranks."""
    folder = groups.rank_zero_first(lambda: commit.begin(run_dir, meta.step))
    writer = PieceWriter(folder, groups.rank)
    for number, (parameter, tensor) in enumerate(global_parameters(chunks)):
        if parameter.placement.axis is None and groups.tensor_rank != 0:
            continue
        state = _gather_state(tensor, optimizer, groups, to=number % groups.layout.data)
        if state is not None:
            _add_pieces(writer, parameter, state, groups)
    writer.flush()

    entries: list = [None] * groups.layout.world
    dist.all_gather_object(entries, writer.entries, group=groups.world)

    def finish() -> Path:
        write_index(folder, [entry for of_rank in entries for entry in of_rank])
        meta.write(folder)
        return commit.commit(run_dir, meta.step, keep)

    return groups.rank_zero_first(finish)


def _gather_state(
    tensor: nn.Parameter, optimizer: StateOwner, groups: Groups, to: int
) -> Tensor | None:
    """Master and moments of a rank's tensor, fp32 [3, *shape], on data rank `to`; elsewhere None.

    Zeros stand for moments before the first step.
    """
    own = optimizer.owned_state(tensor)
    state = torch.zeros(len(KINDS), tensor.numel(), device=tensor.device)
    if own is not None:
        state[0, own.start : own.stop] = own.master
        if own.moments is not None:
            for row, kind in enumerate(KINDS[1:], start=1):
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
