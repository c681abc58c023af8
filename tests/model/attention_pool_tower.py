"""A toy image tower of another family: no class token, attention pooling, norms of epsilon 1e-6.

All that the package needs to train it is in this file. Shape letters as in model/layers.py; D
embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import (
    SequenceLength,
    enter_sequence_parallel,
    leave_sequence_parallel,
    transformer_block,
)
from parallel_clip.model.parameters import Normal, Parameter
from parallel_clip.model.towers.transformer import (
    OPENCLIP_NAMES,
    ZERO,
    BlockInit,
    ImageTowerConfig,
    block_parameters,
    linear_init,
    linear_parameters,
    norm_parameters,
)
from parallel_clip.stages.costs import TowerCosts
from parallel_clip.stages.stage import LayerRange


@dataclass(frozen=True, kw_only=True)
class AttentionPoolConfig(ImageTowerConfig):
    """Its tokens are the patches and nothing else."""

    norm_eps: float = 1e-6

    @property
    def class_tokens(self) -> int:
        return 0

    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        width, normal = self.width, Normal(self.width**-0.5)
        name, shape = "positional_embedding", (self.tokens, width)
        yield Parameter(name, name, shape, normal, decayed=True)
        shape, init = (width, 3, *self.patch_size), linear_init(3 * math.prod(self.patch_size))
        yield Parameter("conv1.weight", "patch_embedding.weight", shape, init, decayed=True)
        biases = linear_init(width), linear_init(self.mlp_width)
        init = BlockInit(normal, normal, normal, normal, *biases)
        yield from block_parameters(self, OPENCLIP_NAMES, lambda layer: init)
        yield from norm_parameters("ln_post", "post_norm", width)
        yield Parameter("pool.probe", "pool.probe", (width,), normal, decayed=False)
        for name, length in (("pool.key_value.", 2 * width), ("pool.output.", embed_dim)):
            yield from linear_parameters(name, name, (length, width), normal, ZERO)

    def costs(self, embed_dim: int) -> TowerCosts:
        pooling = 4 * self.tokens * self.width**2 + 4 * self.tokens * self.width
        return self.tower_costs(self.patch_flops, head=pooling + 2 * self.width * embed_dim)

    @property
    def module_class(self) -> type[nn.Module]:
        return AttentionPoolTower


class AttentionPoolTower(nn.Module):
    """Pictures [b, 3, height, width] or hidden states [S, b, h] to hidden states or features."""

    def __init__(
        self,
        tower: AttentionPoolConfig,
        embed_dim: int,
        config: TransformerConfig,
        group: ProcessGroup,
        layer_range: LayerRange,
        leading_frozen: int = 0,
    ):
        super().__init__()
        assert leading_frozen == 0, "all of it is trained"
        self.config, self.group, self.layer_range = config, group, layer_range
        self.tokens, width = tower.tokens, tower.width
        if layer_range.has_embedding:
            size = tower.patch_size
            self.patch_embedding = nn.Conv2d(3, width, size, stride=size, bias=False)
            self.positional_embedding = nn.Parameter(torch.empty(self.tokens, width))
        lengths = SequenceLength(training=self.tokens, evaluation=self.tokens)
        self.block = transformer_block(config, lengths, False, tower.layer_scale, group)
        if layer_range.has_head:
            self.post_norm = nn.LayerNorm(width, eps=tower.norm_eps)
            self.pool = AttentionPool(width, embed_dim)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.layer_range.has_embedding:
            x_sbh = self.patch_embedding(x).flatten(2).permute(2, 0, 1)
            x_sbh = x_sbh + self.positional_embedding.unsqueeze(1)
            x = enter_sequence_parallel(x_sbh, self.config, self.group)
        x = self.block(x, attention_mask=None)
        if not self.layer_range.has_head:
            return x
        x_sbh = leave_sequence_parallel(x, self.tokens, self.config, self.group)
        return self.pool(self.post_norm(x_sbh))


class AttentionPool(nn.Module):
    """One learned query over all tokens, one head: [s, b, h] -> [b, D]."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(width))
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, embed_dim)

    def forward(self, x_sbh: Tensor) -> Tensor:
        key_sbh, value_sbh = self.key_value(x_sbh).chunk(2, dim=-1)
        weights_sb = (key_sbh @ self.probe * len(self.probe) ** -0.5).softmax(dim=0)
        return self.output((weights_sb.unsqueeze(-1) * value_sbh).sum(0))
