"""Image towers that OpenCLIP takes from timm: the vision transformers of SigLIP, SigLIP 2,
Perception Encoder (PE-Core) and MobileCLIP2-L, with timm's names of parameters.

Beside OpenCLIP's own tower (vision.py) they may have no class token, attention pooling, rotary
positions, and a projection with a bias or none. Shape letters as in vision.py.

Initial values are those of timm 1.0 (`init_weights_vit_timm`, and `Eva.init_weights`).
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
from parallel_clip.model.parameters import Normal, Parameter, with_prefix
from parallel_clip.model.rotary import RotaryGrid, Rotation
from parallel_clip.model.towers.attention_pool import AttentionPool, AttentionPoolConfig
from parallel_clip.model.towers.patch_dropout import keep_tokens
from parallel_clip.model.towers.transformer import (
    ZERO,
    BlockInit,
    BlockNames,
    ImageTowerConfig,
    TransformerTower,
    block_parameters,
    linear_init,
    linear_parameters,
    norm_parameters,
)
from parallel_clip.stages.costs import TowerCosts

TIMM_NAMES = BlockNames(
    "blocks",
    norm_1="norm1",
    query_key_value="attn.qkv.",
    attention_output="attn.proj.",
    norm_2="norm2",
    mlp_input="mlp.fc1.",
    mlp_output="mlp.fc2.",
    layer_scales=("ls1.gamma", "ls2.gamma"),
)
_WEIGHT = Normal(0.02)


@dataclass(frozen=True, kw_only=True)
class TimmVisionConfig(ImageTowerConfig):
    """A vision transformer of timm.

    pre_norm: a norm before the first block, and then no bias in the patch convolution; pool: None
    takes the class token; projection: "head", timm's own classifier with its bias, "linear",
    OpenCLIP's layer behind the trunk, with a bias where `projection_bias` says so, or "none";
    rotary: None where there are no rotary positions; drop_path: stochastic depth in training, which
    is not built; eva: of timm's Eva class, whose initial values are its own and whose pool attends
    to the class token, too, as that of VisionTransformer does not.
    """

    class_token: bool
    pre_norm: bool
    pool: AttentionPoolConfig | None
    projection: Literal["head", "linear", "none"]
    projection_bias: bool
    rotary: RotaryGrid | None
    drop_path: float
    eva: bool

    def settings(self) -> dict[str, Any]:
        """Where OpenCLIP has no key of its own, timm's argument."""
        return super().settings() | {
            "class_token": self.class_token,
            "pre_norm": self.pre_norm,
            "timm_pool": "token" if self.pool is None else "map",
            "attn_pool_num_heads": self.pool and self.pool.heads,
            "attn_pool_mlp_width": self.pool and self.pool.mlp_width,
            "timm_proj": self.projection,
            "timm_proj_bias": self.projection_bias,
            "ref_feat_shape": self.rotary and list(self.rotary.reference),
            "rope_grid_offset": self.rotary and self.rotary.offset,
        }

    @property
    def class_tokens(self) -> int:
        return int(self.class_token)

    @property
    def tokens_before_pool(self) -> int:
        """First tokens to which the attention pool does not attend."""
        return 0 if self.eva else self.class_tokens

    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        yield from with_prefix("trunk.", "", self._trunk_parameters(embed_dim))
        if self.projection == "linear":
            shape, init = (embed_dim, self.width), linear_init(self.width)
            weight, bias = linear_parameters("head.proj.", "projection.", shape, init, init)
            yield weight
            if self.projection_bias:
                yield bias

    def _trunk_parameters(self, embed_dim: int) -> Iterator[Parameter]:
        width, patch_size = self.width, self.patch_size
        if self.class_token:
            init = Normal(0.02 if self.eva else 1e-6)
            yield Parameter("cls_token", "class_token", (1, 1, width), init, decayed=True)
        shape = 1, self.tokens, width
        yield Parameter("pos_embed", "positional_embedding", shape, _WEIGHT, decayed=True)
        name, module, init = "patch_embed.proj.", "patch_embedding.", self._patch_init
        shape = width, 3, *patch_size
        yield Parameter(f"{name}weight", f"{module}weight", shape, init, decayed=True)
        if not self.pre_norm:
            yield Parameter(f"{name}bias", f"{module}bias", (width,), init, decayed=False)
        if self.pre_norm:
            yield from norm_parameters("norm_pre", "pre_norm", width)
        yield from block_parameters(self, TIMM_NAMES, self._block_init)
        yield from norm_parameters("norm", "post_norm", width)
        if self.pool is not None:
            yield from with_prefix("attn_pool.", "pool.", self.pool.parameters(_WEIGHT))
        if self.projection == "head":
            shape, init = (embed_dim, width), Normal(0.02 * (0.001 if self.eva else 1))
            yield from linear_parameters("head.", "projection.", shape, init, ZERO)

    @property
    def _patch_init(self):
        return linear_init(3 * math.prod(self.patch_size))

    def _block_init(self, layer: int) -> BlockInit:
        output = Normal(0.02 / math.sqrt(2 * (layer + 1))) if self.eva else _WEIGHT
        return BlockInit(
            query_key_value=_WEIGHT,
            attention_output=output,
            mlp_input=_WEIGHT,
            mlp_output=output,
            mlp_input_bias=ZERO,
            mlp_output_bias=ZERO,
        )

    def costs(self, embed_dim: int) -> TowerCosts:
        head = 0 if self.projection == "none" else 2 * self.width * embed_dim
        pool = ()
        if self.pool is not None:
            pool = self.pool.units(self.training_tokens - self.tokens_before_pool)
        return self.tower_costs(self.patch_flops, head, pool)

    @property
    def module_class(self) -> type[nn.Module]:
        return TimmVisionTower


class TimmVisionTower(TransformerTower):
    """From pictures [b, 3, height, width]."""

    def build_embedding(self) -> None:
        vision, config = self.tower, self.config
        width, size, dtype = vision.width, vision.patch_size, config.params_dtype
        bias = not vision.pre_norm
        self.patch_embedding = nn.Conv2d(3, width, size, stride=size, bias=bias, dtype=dtype)
        self.class_token = self.empty_parameter(1, 1, width) if vision.class_token else None
        self.positional_embedding = self.empty_parameter(1, vision.tokens, width)
        self.pre_norm = LayerNorm(config) if vision.pre_norm else None

    def build_head(self, embed_dim: int) -> None:
        vision, dtype = self.tower, self.config.params_dtype
        self.post_norm = self.build_norm()
        self.pool = self.projection = None
        if vision.pool is not None:
            self.pool = AttentionPool(vision.pool, self.config, self.group)
        if vision.projection != "none":
            bias = vision.projection == "head" or vision.projection_bias
            self.projection = nn.Linear(vision.width, embed_dim, bias=bias, dtype=dtype)

    def rotation(self) -> Rotation | None:
        vision = self.tower
        if vision.rotary is None:
            return None
        angles = vision.rotary.angles(vision.grid, vision.head_width)
        return Rotation(angles, tokens_before=vision.class_tokens)

    def embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        patches = self.patch_embedding(images.to(self.config.params_dtype))
        x_sbh = patches.flatten(2).permute(2, 0, 1)
        if self.class_token is not None:
            class_token = self.class_token.expand(1, x_sbh.shape[1], -1)
            x_sbh = torch.cat([class_token, x_sbh])
        x_sbh = x_sbh + self.positional_embedding.transpose(0, 1)
        if kept is not None:
            # The class token, where there is one, is the first.
            tokens_bk = kept if self.class_token is None else F.pad(kept + 1, (1, 0))
            x_sbh = keep_tokens(x_sbh, tokens_bk)
        x_Sbh = enter_sequence_parallel(x_sbh, self.config, self.group)
        return x_Sbh if self.pre_norm is None else self.pre_norm(x_Sbh)

    def head(self, x_sbh: Tensor, kept: Tensor | None) -> Tensor:
        if self.pool is None:  # the norm is per token: only the pooled one needs it
            x_bh = self.post_norm(x_sbh[0].clone())  # a view would keep every token for backward
        else:
            x_bh = self.pool(self.post_norm(x_sbh[self.tower.tokens_before_pool :]))
        return x_bh if self.projection is None else self.projection(x_bh)
