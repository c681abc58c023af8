"""The image tower: a vision transformer, its blocks split over the tensor-parallel ranks.

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


class VisionTower(nn.Module):
    """Pictures [b, 3, height, width] -> features [b, D], not normalised."""

    def __init__(
        self,
        vision: VisionArchitecture,
        embed_dim: int,
        config: TransformerConfig,
        tensor_group: ProcessGroup,
    ):
        super().__init__()
        self.vision, self.config, self.group = vision, config, tensor_group
        width, dtype = vision.width, config.params_dtype

        self.patch_embedding = nn.Conv2d(
            3, width, vision.patch_size, stride=vision.patch_size, bias=False, dtype=dtype
        )
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.positional_embedding = nn.Parameter(torch.empty(vision.tokens, width, dtype=dtype))
        self.pre_norm = LayerNorm(config, width, vision.norm_eps) if vision.pre_norm else None
        self.tokens = TokenCount(training=1 + vision.patches_kept, evaluation=vision.tokens)
        self.block = transformer_block(config, self.tokens, False, vision.layer_scale)
        self.post_norm = nn.LayerNorm(width, eps=vision.norm_eps, dtype=dtype)
        self.projection = nn.Parameter(torch.empty(width, embed_dim, dtype=dtype))

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """`kept` [b, k]: the patches to work on (patch dropout); None: all of them."""
        return self.head(self.block(self.embed(images, kept), attention_mask=None))

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """[b, 3, height, width] -> [S, b, h]"""
        patches = self.patch_embedding(images.to(self.projection.dtype))
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
