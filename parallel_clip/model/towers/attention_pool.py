"""Attention pooling: one learned query attends to tokens, and an MLP follows. Heads and MLP are
split over the tensor-parallel ranks.

The "MAP" head of Zhai et al., "Scaling Vision Transformers" (arXiv 2106.04560), with the parameter
names of timm's `AttentionPoolLatent`. Shape letters as in layers.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import ACTIVATIONS, MLP, ColumnLinear, RowLinear
from parallel_clip.model.parameters import (
    COLUMNS,
    ROWS,
    Normal,
    Parameter,
    Placement,
    TruncatedNormal,
)
from parallel_clip.model.towers.transformer import (
    ZERO,
    Activation,
    linear_parameters,
    norm_parameters,
)
from parallel_clip.stages.costs import SplitUnits, units_per_rank


@dataclass(frozen=True)
class AttentionPoolConfig:
    """The pool of a tower as wide as the tower."""

    width: int
    heads: int
    mlp_width: int
    activation: Activation

    def parameters(self, weight: Normal) -> Iterator[Parameter]:
        """weight: the initial values of all matrices."""
        width, mlp_width, unit = self.width, self.mlp_width, self.head_width
        latent = TruncatedNormal(width**-0.5)
        yield Parameter("latent", "latent", (1, 1, width), latent, decayed=True)
        for name, module, shape, placement in (
            ("q.", "query.", (width, width), Placement(axis=0, unit=unit)),
            ("kv.", "key_value.", (2 * width, width), Placement(axis=0, blocks=2, unit=unit)),
            ("proj.", "output.", (width, width), Placement(axis=1, unit=unit)),
        ):
            yield from linear_parameters(name, module, shape, weight, ZERO, placement)
        yield from norm_parameters("norm", "mlp.norm", width)
        for name, module, shape, placement in (
            ("mlp.fc1.", "mlp.linear_fc1.", (mlp_width, width), ROWS),
            ("mlp.fc2.", "mlp.linear_fc2.", (width, mlp_width), COLUMNS),
        ):
            yield from linear_parameters(name, module, shape, weight, ZERO, placement)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def units(self, tokens: int) -> tuple[SplitUnits, SplitUnits]:
        """What tensor ranks split, which is all of it; the query is the same for all pictures and
        its FLOPs are not counted."""
        key_value = 4 * tokens * self.width * self.head_width
        attention = 4 * tokens * self.head_width
        output = 2 * self.head_width * self.width
        heads = SplitUnits("heads of the pool", self.heads, key_value + attention + output)
        return heads, SplitUnits("MLP channels of the pool", self.mlp_width, 4 * self.width)


class AttentionPool(nn.Module):
    """[s, b, h], alike on all tensor ranks -> [b, h], alike on all of them.

    Its linear layers sum the gradients of their input over the ranks: what is before it sees the
    whole gradient on each.
    """

    def __init__(self, pool: AttentionPoolConfig, config: TransformerConfig, group: ProcessGroup):
        super().__init__()
        size, width = group.size(), pool.width
        config = copy.copy(config)
        config.sequence_parallel = False  # all tokens are here
        config.ffn_hidden_size = size * units_per_rank(pool.mlp_width, size)
        config.activation_func = ACTIVATIONS[pool.activation]
        self.heads = units_per_rank(pool.heads, size)
        heads_width = size * self.heads * pool.head_width  # padding included
        self.latent = nn.Parameter(torch.empty(1, 1, width, dtype=config.params_dtype))
        self.query = ColumnLinear(width, heads_width, config, group)
        self.key_value = ColumnLinear(width, 2 * heads_width, config, group)
        self.output = RowLinear(heads_width, width, config, group)
        self.mlp = MLP(config, group)

    def forward(self, x_sbh: Tensor) -> Tensor:
        tokens, batch, _ = x_sbh.shape
        q_bn1d = self.query(self.latent).view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        key_value = self.key_value(x_sbh).view(tokens, batch, 2, self.heads, -1)
        k_bnsd, v_bnsd = key_value.permute(2, 1, 3, 0, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q_bn1d, k_bnsd, v_bnsd)
        x_1bh = _with_bias(self.output(attended.reshape(1, batch, -1)))
        return (x_1bh + _with_bias(self.mlp(x_1bh)))[0]


def _with_bias(product_and_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    product, bias = product_and_bias
    return product if bias is None else product + bias
