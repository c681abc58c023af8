"""Attention pooling: one learned query attends to all tokens, and an MLP follows. Heads and MLP are
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
    KEY_VALUE,
    ROWS,
    Normal,
    Parameter,
    TruncatedNormal,
)
from parallel_clip.model.towers.transformer import (
    ZERO,
    Activation,
    linear_parameters,
    norm_parameters,
)


@dataclass(frozen=True)
class AttentionPoolConfig:
    """The pool of a tower as wide as the tower."""

    width: int
    heads: int
    mlp_width: int
    activation: Activation

    def parameters(self, weight: Normal) -> Iterator[Parameter]:
        """weight: the initial values of all matrices."""
        width, mlp_width = self.width, self.mlp_width
        latent = TruncatedNormal(width**-0.5)
        yield Parameter("latent", "latent", (1, 1, width), latent, decayed=True)
        for name, module, shape, placement in (
            ("q.", "query.", (width, width), ROWS),
            ("kv.", "key_value.", (2 * width, width), KEY_VALUE),
            ("proj.", "output.", (width, width), COLUMNS),
        ):
            yield from linear_parameters(name, module, shape, weight, ZERO, placement)
        yield from norm_parameters("norm", "mlp.norm", width)
        for name, module, shape, placement in (
            ("mlp.fc1.", "mlp.linear_fc1.", (mlp_width, width), ROWS),
            ("mlp.fc2.", "mlp.linear_fc2.", (width, mlp_width), COLUMNS),
        ):
            yield from linear_parameters(name, module, shape, weight, ZERO, placement)

    def flops(self, tokens: int) -> int:
        """FLOPs, forward, of one picture; the query is the same for all and not counted."""
        key_value = 4 * tokens * self.width**2
        attention = 4 * tokens * self.width
        return key_value + attention + 2 * self.width**2 + 4 * self.width * self.mlp_width

    @property
    def split(self) -> tuple[tuple[str, int], ...]:
        """What tensor ranks split, each with its name in messages."""
        return ("heads of the pool", self.heads), ("MLP channels of the pool", self.mlp_width)


class AttentionPool(nn.Module):
    """[s, b, h], alike on all tensor ranks -> [b, h], alike on all of them.

    Its linear layers sum the gradients of their input over the ranks: what is before it sees the
    whole gradient on each.
    """

    def __init__(self, pool: AttentionPoolConfig, config: TransformerConfig, group: ProcessGroup):
        super().__init__()
        config = copy.copy(config)
        config.sequence_parallel = False  # all tokens are here
        config.num_attention_heads = pool.heads
        config.ffn_hidden_size = pool.mlp_width
        config.activation_func = ACTIVATIONS[pool.activation]
        width = pool.width
        self.heads = pool.heads // group.size()
        self.latent = nn.Parameter(torch.empty(1, 1, width, dtype=config.params_dtype))
        self.query = ColumnLinear(width, width, config, group)
        self.key_value = ColumnLinear(width, 2 * width, config, group)
        self.output = RowLinear(width, width, config, group)
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
