"""What the transformer towers share: their shape, block and norm parameters, costs of a block.

A tower is described by a TowerConfig (what it is) and built as a module (a rank's slice of one
stage of it). A tower of another family is one new file here with both. Shape letters as in
layers.py; D embedding width.

Initial values follow OpenCLIP 3.3.0 (its own and torch's defaults); weight decay its trainer's
rule: weights of two or more dimensions, no norms and no biases.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import SequenceLength, leave_sequence_parallel, transformer_block
from parallel_clip.model.parameters import (
    COLUMNS,
    ROWS,
    WHOLE,
    Constant,
    Normal,
    Parameter,
    Placement,
    Uniform,
)
from parallel_clip.model.rotary import Rotation
from parallel_clip.stages.costs import SplitUnits, TowerCosts, block_units
from parallel_clip.stages.stage import LayerRange

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]

ZERO = Constant(0.0)


@dataclass(frozen=True, kw_only=True)
class TowerConfig(ABC):
    """A tower of `layers` pre-norm transformer blocks: its shape, and all that others ask of it.

    `layer_scale` is the initial value of the scale on each residual branch (None: there is none);
    `causal`: a token attends to itself and those before it.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    layer_scale: float | None
    activation: Activation
    norm_eps: float
    causal: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens pass through the blocks in evaluation."""

    @property
    def training_tokens(self) -> int:
        """How many tokens pass through the blocks in training."""
        return self.tokens

    def settings(self) -> dict[str, Any]:
        """What decides the tower's features, by OpenCLIP's keys, defaults filled in. What matters
        in training alone is left out."""
        return {
            "layers": self.layers,
            "width": self.width,
            "mlp_ratio": self.mlp_width / self.width,
            "ls_init_value": self.layer_scale is not None,
            "quick_gelu": self.activation == "quick_gelu",
            "act_kwargs": {"approximate": "tanh"} if self.activation == "gelu_tanh" else {},
            "norm_kwargs": {"eps": self.norm_eps},
        }

    @abstractmethod
    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        """The tower's parameters, without the names' prefixes that say which tower it is."""

    @abstractmethod
    def costs(self, embed_dim: int) -> TowerCosts: ...

    @property
    @abstractmethod
    def module_class(self) -> type[nn.Module]:
        """Builds a rank's slice of the layers of a LayerRange, with the embedding and the head
        where it holds them: (this config, embed_dim, TransformerConfig of these layers, tensor
        group, layer range, number of its first layers before all that is trained). Weights are not
        set. Those first layers are at `frozen_block.layers`, the others at `block.layers`, each
        counted from 0.

        forward(x, kept) of an image tower, forward(x, tokens) of a text tower: x is what the tower
        starts from (images fp32 [b, 3, height, width]; None for texts) or the hidden states
        [S, b, h] that the stage before hands on. It returns hidden states, or features [b, D].
        """

    def tower_costs(
        self, embedding: int, head: int, split_of_head: tuple[SplitUnits, ...] = ()
    ) -> TowerCosts:
        """Its costs, given the FLOPs of embedding and head, and what tensor ranks split of the head
        beside that."""
        block = block_units(self.training_tokens, self.width, self.heads, self.mlp_width)
        return TowerCosts(self.layers, embedding, block, head, split_of_head)


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig(TowerConfig):
    """An image tower that works on patches: what others ask of it beside TowerConfig.

    Sizes in pixels are (height, width). patch_dropout: the part of the patches, 0 to below 1, that
    is left out in training.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    patch_dropout: float = 0.0

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "head_width": self.head_width,
            "image_size": list(self.image_size),
            "patch_size": list(self.patch_size),
        }

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
        """Patches of a picture that pass through the blocks in training, by the rounding of
        OpenCLIP and timm; where they are fewer than `patches`, the tower is told which."""
        return max(1, int(self.patches * (1 - self.patch_dropout)))

    @property
    def class_tokens(self) -> int:
        """Tokens before the patches: one, or none."""
        return 1

    @property
    def tokens(self) -> int:
        return self.class_tokens + self.patches

    @property
    def training_tokens(self) -> int:
        return self.class_tokens + self.patches_kept

    @property
    def patch_flops(self) -> int:
        """FLOPs of the patch convolution."""
        return 2 * self.patches * 3 * math.prod(self.patch_size) * self.width


class TransformerTower(nn.Module, ABC):
    """The layers of a tower that `layer_range` says: from what the tower starts from or hidden
    states [S, b, h], to hidden states or features [b, D], not normalised."""

    def __init__(
        self,
        tower: TowerConfig,
        embed_dim: int,
        config: TransformerConfig,
        tensor_group: ProcessGroup,
        layer_range: LayerRange,
        leading_frozen: int = 0,
    ):
        super().__init__()
        self.tower, self.config, self.group = tower, config, tensor_group
        self.layer_range = layer_range
        self.tokens = SequenceLength(tower.training_tokens, tower.tokens)
        if layer_range.has_embedding:
            self.build_embedding()
        self.frozen_block = self._build_block(leading_frozen)
        self.block = self._build_block(layer_range.layers - leading_frozen)
        if layer_range.has_head:
            self.build_head(embed_dim)

    def _build_block(self, layers: int) -> nn.Module | None:
        if layers == 0:
            return None
        tower, config = self.tower, copy.copy(self.config)
        config.num_layers = layers
        return transformer_block(
            config, self.tokens, tower.causal, tower.layer_scale, self.group, self.rotation()
        )

    @abstractmethod
    def build_embedding(self) -> None:
        """Make the modules and parameters that `embed` uses."""

    @abstractmethod
    def build_head(self, embed_dim: int) -> None:
        """Make the modules and parameters that `head` uses."""

    def rotation(self) -> Rotation | None:
        """By what attention turns queries and keys at each token; None: it does not."""
        return None

    def build_norm(self) -> nn.LayerNorm:
        """A norm of tokens that every tensor rank has."""
        tower, dtype = self.tower, self.config.params_dtype
        return nn.LayerNorm(tower.width, tower.norm_eps, dtype=dtype)

    def empty_parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype))

    def forward(self, x: Tensor | None, beside: Tensor | None = None) -> Tensor:
        """beside: the patches to work on, int64 [b, k], None for all of them; or the token ids of
        texts, int64 [b, s]."""
        if self.layer_range.has_embedding:
            x = self.embed(x, beside)
        if self.frozen_block is not None:
            with torch.no_grad():
                x = self.frozen_block(x, attention_mask=None)
        if self.block is not None:
            if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
                # Where its input has no gradient, megatron-core's recomputation gives none to a
                # layer's weights either.
                x = x if x.requires_grad else x.detach().requires_grad_()
            x = self.block(x, attention_mask=None)
        if not self.layer_range.has_head:
            return x
        x_sbh = leave_sequence_parallel(x, self.tokens.of(self), self.config, self.group)
        return self.head(x_sbh, beside)

    @abstractmethod
    def embed(self, x: Tensor | None, beside: Tensor | None) -> Tensor:
        """What the tower starts from -> [S, b, h]"""

    @abstractmethod
    def head(self, x_sbh: Tensor, beside: Tensor | None) -> Tensor:
        """[s, b, h] -> [b, D]"""


class BlockNames(NamedTuple):
    """A block's names in a state dict: `blocks` before its number, then those of its parts. What
    comes before "weight" and "bias" has its dot."""

    blocks: str
    norm_1: str
    query_key_value: str
    attention_output: str
    norm_2: str
    mlp_input: str
    mlp_output: str
    layer_scales: tuple[str, str]


OPENCLIP_NAMES = BlockNames(
    "transformer.resblocks",
    norm_1="ln_1",
    query_key_value="attn.in_proj_",
    attention_output="attn.out_proj.",
    norm_2="ln_2",
    mlp_input="mlp.c_fc.",
    mlp_output="mlp.c_proj.",
    layer_scales=("ls_1.gamma", "ls_2.gamma"),
)


class BlockInit(NamedTuple):
    """Initial values of the four weights of a block, and of the biases of its MLP. Those of
    attention begin at zero."""

    query_key_value: Normal | Uniform
    attention_output: Normal | Uniform
    mlp_input: Normal | Uniform
    mlp_output: Normal | Uniform
    mlp_input_bias: Uniform | Constant
    mlp_output_bias: Uniform | Constant


def linear_init(fan_in: int) -> Uniform:
    """torch's default for the weight and the bias of a linear layer or a convolution: uniform up to
    1/sqrt(fan_in)."""
    return Uniform(fan_in**-0.5)


def linear_parameters(
    name: str,
    module: str,
    shape: tuple[int, int],
    weight: Normal | Uniform,
    bias: Uniform | Constant,
    placement: Placement = WHOLE,
) -> Iterator[Parameter]:
    """Weight [out, in] and bias [out] of a linear layer, with their initial values. `placement` is
    the weight's, and the bias follows where the outputs are split. `name` and `module` end before
    "weight" and "bias"."""
    yield Parameter(f"{name}weight", f"{module}weight", shape, weight, True, placement)
    of_bias = placement if placement.axis == 0 else WHOLE
    yield Parameter(f"{name}bias", f"{module}bias", shape[:1], bias, False, of_bias)


def norm_parameters(name: str, module: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", f"{module}.weight", (width,), Constant(1.0), decayed=False)
    yield Parameter(f"{name}.bias", f"{module}.bias", (width,), ZERO, decayed=False)


def block_parameters(
    tower: TowerConfig, names: BlockNames, init: Callable[[int], BlockInit]
) -> Iterator[Parameter]:
    """Those of all blocks, in order. init: of the block of a number."""
    width, mlp_width = tower.width, tower.mlp_width
    query_key_value = Placement(axis=0, blocks=3, unit=tower.head_width)
    heads = Placement(axis=1, unit=tower.head_width)
    for layer in range(tower.layers):
        first = init(layer)
        qkv = (3 * width, width), first.query_key_value, ZERO, query_key_value
        output = (width, width), first.attention_output, ZERO, heads
        mlp_input = (mlp_width, width), first.mlp_input, first.mlp_input_bias, ROWS
        mlp_output = (width, mlp_width), first.mlp_output, first.mlp_output_bias, COLUMNS
        name, module = f"{names.blocks}.{layer}.", f"block.layers.{layer}"
        attention, mlp = f"{module}.self_attention.", f"{module}.mlp."
        yield from norm_parameters(name + names.norm_1, attention + "norm", width)
        for part, ours, of_part in (
            (names.query_key_value, attention + "linear_qkv.", qkv),
            (names.attention_output, attention + "linear_proj.", output),
        ):
            yield from linear_parameters(name + part, ours, *of_part)
        yield from norm_parameters(name + names.norm_2, mlp + "norm", width)
        for part, ours, of_part in (
            (names.mlp_input, mlp + "linear_fc1.", mlp_input),
            (names.mlp_output, mlp + "linear_fc2.", mlp_output),
        ):
            yield from linear_parameters(name + part, ours, *of_part)
        if tower.layer_scale is not None:
            scale = Constant(tower.layer_scale)
            places = f"{module}.self_attn_bda.gamma", f"{module}.mlp_bda.gamma"
            for gamma, ours in zip(names.layer_scales, places, strict=True):
                yield Parameter(name + gamma, ours, (width,), scale, decayed=False)
