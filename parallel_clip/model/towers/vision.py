"""The image tower of OpenCLIP: a vision transformer, its blocks split over the tensor-parallel
ranks and its layers over the stages of a pipeline.

Shape letters as in layers.py; p patches, k kept patches, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_clip.model.layers import LayerNorm, enter_sequence_parallel
from parallel_clip.model.parameters import Normal, Parameter, Uniform
from parallel_clip.model.towers.patch_dropout import keep_tokens
from parallel_clip.model.towers.transformer import (
    OPENCLIP_NAMES,
    BlockInit,
    ImageTowerConfig,
    TransformerTower,
    block_parameters,
    linear_init,
    norm_parameters,
)
from parallel_clip.stages.costs import TowerCosts


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ImageTowerConfig):
    """OpenCLIP's image tower: patches and a class token; `pre_norm`: a LayerNorm before the first
    block."""

    pool: Literal["tok", "avg"]
    final_norm_after_pool: bool
    pre_norm: bool

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "pool_type": self.pool,
            "final_ln_after_pool": self.final_norm_after_pool,
            "no_ln_pre": not self.pre_norm,
        }

    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        width, patch_size = self.width, self.patch_size
        normal = Normal(width**-0.5)
        yield Parameter("class_embedding", "class_embedding", (width,), normal, decayed=False)
        name, shape = "positional_embedding", (self.tokens, width)
        yield Parameter(name, name, shape, normal, decayed=True)
        shape, init = (width, 3, *patch_size), linear_init(3 * math.prod(patch_size))
        yield Parameter("conv1.weight", "patch_embedding.weight", shape, init, decayed=True)
        if self.pre_norm:
            yield from norm_parameters("ln_pre", "pre_norm", width)
        init = BlockInit(
            query_key_value=Uniform(math.sqrt(6 / (4 * width))),  # Glorot and Bengio (2010)
            attention_output=linear_init(width),
            mlp_input=linear_init(width),
            mlp_output=linear_init(self.mlp_width),
            mlp_input_bias=linear_init(width),
            mlp_output_bias=linear_init(self.mlp_width),
        )
        yield from block_parameters(self, OPENCLIP_NAMES, lambda layer: init)
        yield from norm_parameters("ln_post", "post_norm", width)
        yield Parameter("proj", "projection", (width, embed_dim), normal, decayed=True)

    def costs(self, embed_dim: int) -> TowerCosts:
        """Patch dropout spares the blocks, not the patch convolution; only the pooled token is
        projected."""
        return self.tower_costs(embedding=self.patch_flops, head=2 * self.width * embed_dim)

    @property
    def module_class(self) -> type[nn.Module]:
        return VisionTower


class VisionTower(TransformerTower):
    """From pictures [b, 3, height, width]."""

    def build_embedding(self) -> None:
        vision, config = self.tower, self.config
        width, size, dtype = vision.width, vision.patch_size, config.params_dtype
        self.patch_embedding = nn.Conv2d(3, width, size, stride=size, bias=False, dtype=dtype)
        self.class_embedding = self.empty_parameter(width)
        self.positional_embedding = self.empty_parameter(vision.tokens, width)
        self.pre_norm = LayerNorm(config) if vision.pre_norm else None

    def build_head(self, embed_dim: int) -> None:
        self.post_norm = self.build_norm()
        self.projection = self.empty_parameter(self.tower.width, embed_dim)

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        patches = self.patch_embedding(images.to(self.config.params_dtype))
        x_pbh = patches.flatten(2).permute(2, 0, 1)
        class_token = self.class_embedding.expand(1, x_pbh.shape[1], -1)
        x_sbh = torch.cat([class_token, x_pbh]) + self.positional_embedding.unsqueeze(1)
        if kept is not None:
            x_sbh = keep_tokens(x_sbh, F.pad(kept + 1, (1, 0)))  # the class token is the first
        x_Sbh = enter_sequence_parallel(x_sbh, self.config, self.group)
        return x_Sbh if self.pre_norm is None else self.pre_norm(x_Sbh)

    def head(self, x_sbh: Tensor, kept: Tensor | None) -> Tensor:
        if self.tower.pool == "tok":  # the norm is per token: only the pooled one needs it
            x_bh = self.post_norm(x_sbh[0].clone())  # a view would keep every token for backward
        elif self.tower.final_norm_after_pool:
            x_bh = self.post_norm(x_sbh[1:].mean(0))
        else:
            x_bh = self.post_norm(x_sbh[1:]).mean(0)
        return x_bh @ self.projection
