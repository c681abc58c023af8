"""The image tower: a vision transformer, its blocks split over the tensor-parallel ranks and its
layers over the stages of a pipeline.

Shape letters as in layers.py; p patches, k kept patches, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.architectures import VisionArchitecture
from parallel_clip.model.layers import (
    LayerNorm,
    TokenCount,
    enter_sequence_parallel,
    leave_sequence_parallel,
    transformer_block,
)
from parallel_clip.pipeline.partition import LayerRange


class VisionTower(nn.Module):
    """Pictures [b, 3, height, width] -> features [b, D], not normalised; or the stretch of it that
    `held` says: from pictures or hidden states [S, b, h], to hidden states or features."""

    def __init__(
        self,
        vision: VisionArchitecture,
        embed_dim: int,
        config: TransformerConfig,
        tensor_group: ProcessGroup,
        held: LayerRange,
    ):
        super().__init__()
        self.vision, self.config, self.group, self.held = vision, config, tensor_group, held
        self.tokens = TokenCount(training=1 + vision.patches_kept, evaluation=vision.tokens)
        if held.embeds:
            self._build_embedding()
        self.block = transformer_block(config, self.tokens, False, vision.layer_scale)
        if held.heads:
            width, dtype = vision.width, config.params_dtype
            self.post_norm = nn.LayerNorm(width, eps=vision.norm_eps, dtype=dtype)
            self.projection = nn.Parameter(torch.empty(width, embed_dim, dtype=dtype))

    def _build_embedding(self) -> None:
        vision, config = self.vision, self.config
        width, dtype = vision.width, config.params_dtype
        self.patch_embedding = nn.Conv2d(
            3, width, vision.patch_size, stride=vision.patch_size, bias=False, dtype=dtype
        )
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.positional_embedding = nn.Parameter(torch.empty(vision.tokens, width, dtype=dtype))
        self.pre_norm = LayerNorm(config, width, vision.norm_eps) if vision.pre_norm else None

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` [b, k]: the patches to work on (patch dropout); None: all of them."""
        if self.held.embeds:
            x = self.embed(x, kept)
        x = self.block(x, attention_mask=None)
        return self.head(x) if self.held.heads else x

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """[b, 3, height, width] -> [S, b, h]"""
        patches = self.patch_embedding(images.to(self.config.params_dtype))
        x_pbh = patches.flatten(2).permute(2, 0, 1)
        class_token = self.class_embedding.expand(1, x_pbh.shape[1], -1)
        x_sbh = torch.cat([class_token, x_pbh]) + self.positional_embedding.unsqueeze(1)
        if kept is not None:
            x_sbh = _keep(x_sbh, kept)
        x_Sbh = enter_sequence_parallel(x_sbh, self.config, self.group)
        return x_Sbh if self.pre_norm is None else self.pre_norm(x_Sbh)

    def head(self, x_Sbh: Tensor) -> Tensor:
        """[S, b, h] -> [b, D]"""
        x_sbh = leave_sequence_parallel(x_Sbh, self.tokens.of(self), self.config, self.group)
        return self._pool(x_sbh) @ self.projection

    def _pool(self, x_sbh: Tensor) -> Tensor:
        if self.vision.pool == "tok":  # the norm is per token: only the pooled one needs it
            return self.post_norm(x_sbh[0].clone())  # a view would keep every token for backward
        if self.vision.final_norm_after_pool:
            return self.post_norm(x_sbh[1:].mean(0))
        return self.post_norm(x_sbh[1:]).mean(0)


def _keep(x_sbh: Tensor, kept_bk: Tensor) -> Tensor:
    """The class token and the kept patches of each picture: [1 + p, b, h] -> [1 + k, b, h]."""
    tokens_bk = F.pad(kept_bk + 1, (1, 0))
    index = tokens_bk.t().unsqueeze(-1).expand(-1, -1, x_sbh.shape[-1])
    return x_sbh.gather(0, index)
