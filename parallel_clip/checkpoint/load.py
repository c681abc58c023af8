"""Reading a checkpoint into any layout: each rank reads the ranges that it holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import KINDS, PieceReader
from parallel_clip.engine.groups import Groups
from parallel_clip.model.parameters import Parameter, fill_slice
from parallel_clip.optimizer.train_state import TrainState


def load_checkpoint(folder: Path, state: TrainState, groups: Groups) -> Meta:
    """Fill a rank's weights, masters and moments from a checkpoint written in any layout.

    A checkpoint without moments (of a conversion) leaves the optimizer's as they are.

    Raises:
        InputError: the checkpoint is damaged.
    """
    meta = Meta.read(folder)
    reader = PieceReader(folder)
    for parameter, tensor in state.global_parameters():
        values = {
            kind: read_local(reader, f"{kind}:{parameter.name}", parameter, groups)
            for kind in (KINDS if meta.has_moments else KINDS[:1])
        }
        state.optimizer.set_weight(tensor, values.pop("weight"))
        if meta.has_moments and meta.step > 0:
            state.optimizer.set_moments(tensor, values, meta.step)
    return meta


def read_local(reader: PieceReader, key: str, parameter: Parameter, groups: Groups) -> Tensor:
    """This tensor rank's part of a tensor: fp32 on the CPU, zeros where padded."""
    axis = parameter.placement.axis
    if axis is None:
        return reader.read(key)
    rank, size = groups.tensor_rank, groups.layout.tensor
    part = torch.zeros(parameter.local_shape(size))
    read_range = partial(reader.read_range, key)
    return fill_slice(part, parameter.placement, parameter.shape[axis], rank, size, read_range)
