"""Rotary positions on a grid of patches: attention turns each pair of channels of queries and keys
by an angle that grows with the patch's place, half of the pairs across and half of them down.

Su et al., "RoFormer" (arXiv 2104.09864); on a grid as in Fang et al., "EVA-02" (arXiv 2303.11331).
Shape letters as in layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BASE = 10_000.0


@dataclass(frozen=True)
class RotaryGrid:
    """reference: patches down and across of the grid whose places are counted one by one; another
    grid is stretched onto it. offset: the number of the first place."""

    reference: tuple[int, int]
    offset: float

    def angles(self, grid: tuple[int, int], head_width: int) -> Tensor:
        """fp32 [p, d / 2] of the patches of a grid, row by row. d has to be a multiple of 4."""
        pairs = head_width // 4
        frequencies = 1 / _BASE ** (torch.arange(pairs).float() / pairs)
        down, across = (
            (torch.arange(length).float() + self.offset) / length * reference
            for length, reference in zip(grid, self.reference, strict=True)
        )
        places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
        return (places.unsqueeze(-1) * frequencies).reshape(-1, 2 * pairs)


class Rotation:
    """Turns [b, n, s, d] by the angles of its tokens, in fp32. Tokens before the patches, such as a
    class token, are not turned."""

    def __init__(self, angles: Tensor, tokens_before: int):
        """angles: fp32 [p, d / 2]"""
        still = angles.new_zeros(tokens_before, angles.shape[1])
        turned = torch.cat([still, angles]).repeat_interleave(2, dim=-1)  # both of a pair alike
        self._cos, self._sin = turned.cos(), turned.sin()

    def __call__(self, x_bnsd: Tensor) -> Tensor:
        return _Rotate.apply(x_bnsd, self._cos, self._sin)


class _Rotate(torch.autograd.Function):
    """Keeps nothing of its input: a rotation's gradient is turned back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.angles = cos, sin
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.angles
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + across * sin).to(x.dtype)
