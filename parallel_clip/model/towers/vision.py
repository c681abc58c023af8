"""The image tower: a vision transformer, its blocks split over the tensor-parallel ranks and its
layers over the stages of a pipeline.

Shape letters as in layers.py; p patches, k kept patches, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import (
    LayerNorm,
    SequenceLength,
    enter_sequence_parallel,
    leave_sequence_parallel,
    transformer_block,
)
from parallel_clip.model.towers.transformer import Activation
from parallel_clip.stages.stage import LayerRange


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: patches and a class token through pre-norm transformer blocks.

    Sizes in pixels are (height, width). `layer_scale` is the initial value of the scale on each
    residual branch (None: there is none); `pre_norm` a LayerNorm before the first block.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    pool: Literal["tok", "avg"]
    final_norm_after_pool: bool
    pre_norm: bool
    layer_scale: float | None
    patch_dropout: float
    activation: Activation
    norm_eps: float

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; pixels that do not fill a patch are left out."""
        (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
        return height // patch_height, width // patch_width

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patches_kept(self) -> int:
        """Patches of a picture that pass through the blocks in training, by OpenCLIP's rounding."""
        return max(1, int(self.patches * (1 - self.patch_dropout)))

    @property
    def tokens(self) -> int:
        """Sequence length without patch dropout: the patches and the class token."""
        return self.patches + 1


class VisionTower(nn.Module):
    """Pictures [b, 3, height, width] -> features [b, D], not normalised; or the stretch of it that
    `held` says: from pictures or hidden states [S, b, h], to hidden states or features."""

    def __init__(
        self,
        vision: VisionConfig,
        embed_dim: int,
        config: TransformerConfig,
        tensor_group: ProcessGroup,
        held: LayerRange,
    ):
        super().__init__()
        self.vision, self.config, self.group, self.held = vision, config, tensor_group, held
        self.tokens = SequenceLength(training=1 + vision.patches_kept, evaluation=vision.tokens)
        if held.has_embedding:
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
        if self.held.has_embedding:
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
