"""Learned positions for another number of patches or tokens, by interpolation.

The numbers are those of OpenCLIP 3.3.0 (`resize_pos_embed`, `resize_text_pos_embed`) and, for its
trunks, of timm 1.0 (`resample_abs_pos_embed`), but for the old grid, which OpenCLIP takes to be
square. Rotary positions are not learned: they are computed for whatever grid a model has
(rotary.py). Shape letters as in layers.py; n positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.model.architecture import Architecture, parameter_table


class PositionGrid(NamedTuple):
    """Where the tokens of a tower stand. size: patches (down, across), or the (length,) of a text;
    before: tokens before these that have no place in the grid, such as a class token."""

    size: tuple[int, ...]
    before: int = 0

    @property
    def length(self) -> int:
        """How many positions there are, those before the grid included."""
        return self.before + math.prod(self.size)

    def __str__(self) -> str:
        return " x ".join(map(str, self.size))


def position_grids(architecture: Architecture) -> dict[str, PositionGrid]:
    """The grid of each learned position embedding of a model, by its global name."""
    vision, text = architecture.vision, architecture.text
    names = {p.module: p.name for p in parameter_table(architecture)}
    return {
        names["vision.positional_embedding"]: PositionGrid(
            vision.grid, vision.tokens - vision.patches
        ),
        names["text.positional_embedding"]: PositionGrid((text.context_length,)),
    }


def resize_embedding(
    tensor: Tensor, old: PositionGrid, new: PositionGrid, *, is_square: bool = False
) -> Tensor:
    """As `resize_positions`, of a tensor [..., n, h] as it is in a model: fp32 [..., new n, h].
    is_square: it is of squares, such as Adam's second moment; what comes out below 0 becomes 0."""
    *first, _, width = tensor.shape
    resized = resize_positions(tensor.reshape(-1, width), old, new)
    if is_square:
        resized = resized.clamp(min=0)
    return resized.reshape(*first, -1, width)


def resize_positions(positions_nh: Tensor, old: PositionGrid, new: PositionGrid) -> Tensor:
    """Positions [n, h] of an old grid for a new one: fp32 [new n, h]. Pictures: bicubic, with
    antialias; texts: linear. What is before the grid stays as it is.

    It is linear in the positions, so that it also serves what lies beside them, such as Adam's
    first moment. Bicubic weights are in part negative, and so may be what comes of a second moment.

    Raises:
        ValueError: the positions are not those of `old`, or the grids are of different kinds.
    """
    if len(positions_nh) != old.length:
        raise ValueError(f"{len(positions_nh)} positions are not those of {old!r}")
    if (len(old.size), old.before) != (len(new.size), new.before):
        raise ValueError(f"positions of {old!r} have no counterpart in {new!r}")
    positions_nh = positions_nh.float()
    if old == new:
        return positions_nh
    before, placed = positions_nh[: old.before], positions_nh[old.before :]
    placed = placed.reshape(1, *old.size, -1).movedim(-1, 1)
    is_text = len(old.size) == 1
    placed = F.interpolate(
        placed,
        new.size,
        mode="linear" if is_text else "bicubic",
        antialias=not is_text,
        align_corners=False,
    )
    return torch.cat([before, placed.movedim(1, -1).reshape(math.prod(new.size), -1)])
