"""The tensor-parallel transformer block: megatron-core's, with our own parts in it.

megatron-core gives the block, the layer's residual structure, recomputation and the parallel
linear layers. The parts here are what its local spec lacks for CLIP: see docs/decisions.md.

Shape letters: s tokens, S tokens on this rank (s padded to a multiple of t and divided by t under
sequence parallelism, otherwise s), b pairs, h width, m MLP width, n heads, d head width, t tensor
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.rotary import Rotation


@dataclass(frozen=True)
class SequenceLength:
    """How many real tokens a tower works on; the rest of a padded sequence is padding."""

    training: int
    evaluation: int

    def of(self, module: nn.Module) -> int:
        return self.training if module.training else self.evaluation


def transformer_block(
    config: TransformerConfig,
    tokens: SequenceLength,
    causal: bool,
    layer_scale: float | None,
    tensor_group: ProcessGroup,
    rotation: Rotation | None = None,
) -> TransformerBlock:
    """A stack of `config.num_layers` pre-LN layers without a final norm: [S, b, h] -> [S, b, h].

    Attention and MLP each begin with their own norm, so the layer's norms stay empty.
    """

    class GroupMLP(MLP):  # megatron-core 0.16 builds an MLP of another class from its config alone
        def __init__(self, config: TransformerConfig, **_):
            super().__init__(config, tensor_group)

    residual_add = ModuleSpec(ResidualAdd, params={"config": config, "layer_scale": layer_scale})
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                SelfAttention, params={"tokens": tokens, "causal": causal, "rotation": rotation}
            ),
            self_attn_bda=residual_add,
            mlp=GroupMLP,
            mlp_bda=residual_add,
        ),
    )
    return TransformerBlock(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=None),
        post_layer_norm=False,
        # The block is told its own layers, so megatron-core need not ask for the pipeline rank.
        pg_collection=ProcessGroupCollection(tp=tensor_group, pp=None),
    )


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose gradients megatron-core sums over the tensor group under sequence parallelism
    (each rank then norms only its own tokens)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config.hidden_size, config.layernorm_epsilon, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


class ColumnLinear(ColumnParallelLinear):
    """[S, b, in] -> [s, b, out/t] with its bias added."""

    def __init__(self, in_features: int, out_features: int, config, group: ProcessGroup):
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=None,
            gather_output=False,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:  # nothing to communicate: one fused addmm
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """[s, b, in/t] -> [S, b, out]; returns the bias beside the product where it is not in it yet.

    With several ranks the bias must be added once, after their products are summed, where the
    residual is added too.
    """

    def __init__(self, in_features: int, out_features: int, config, group: ProcessGroup):
        super().__init__(
            in_features,
            out_features,
            config=config,
            init_method=None,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=group,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() == 1:
            return F.linear(x, self.weight, self.bias), None
        if not self.sequence_parallel:
            return super().forward(x)
        # Padded only now: x is what backward keeps, and a padded copy of it would be kept as well.
        product = pad_to_multiple(F.linear(x, self.weight), self.tp_group.size())
        return reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group), self.bias


class SelfAttention(MegatronModule):
    """Norm and self-attention, whole heads per tensor rank: [S, b, h] -> [S, b, h], bias.

    A rank's rows of the fused projection are its heads' [query; key; value], in OpenCLIP's order.
    Padding is cut off before the attention itself, so it never takes part in it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        tokens: SequenceLength,
        causal: bool,
        rotation: Rotation | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        width = config.hidden_size
        heads_width = config.num_attention_heads * config.kv_channels  # padding included
        self.tokens = tokens
        self.causal = causal
        self.rotation = rotation
        self.heads = config.num_attention_heads // pg_collection.tp.size()
        self.norm = LayerNorm(config)
        self.linear_qkv = ColumnLinear(width, 3 * heads_width, config, pg_collection.tp)
        self.linear_proj = RowLinear(heads_width, width, config, pg_collection.tp)

    def forward(self, x_Sbh: Tensor, **_) -> tuple[Tensor, Tensor | None]:
        # [s + padding, b, 3·h/t]
        qkv = recompute_activation(self, self.norm, x_Sbh, self.linear_qkv)
        tokens, batch = self.tokens.of(self), qkv.shape[1]
        qkv = qkv[:tokens].view(tokens, batch, 3, self.heads, -1)
        q_bnsd, k_bnsd, v_bnsd = qkv.permute(2, 1, 3, 0, 4).unbind(0)
        if self.rotation is not None:
            q_bnsd, k_bnsd = self.rotation(q_bnsd), self.rotation(k_bnsd)
        attended = F.scaled_dot_product_attention(q_bnsd, k_bnsd, v_bnsd, is_causal=self.causal)
        attended = attended.permute(2, 0, 1, 3).reshape(tokens, batch, -1)  # [s, b, h/t]
        return self.linear_proj(attended)


class MLP(MegatronModule):
    """Norm, linear, activation, linear: [S, b, h] -> [S, b, h], bias."""

    def __init__(self, config: TransformerConfig, group: ProcessGroup):
        super().__init__(config)
        width, mlp_width = config.hidden_size, config.ffn_hidden_size
        self.norm = LayerNorm(config)
        self.linear_fc1 = ColumnLinear(width, mlp_width, config, group)
        self.linear_fc2 = RowLinear(mlp_width, width, config, group)
        self.activation = config.activation_func

    def forward(self, x_Sbh: Tensor, **_) -> tuple[Tensor, Tensor | None]:
        x_sbm = recompute_activation(self, self.norm, x_Sbh, self.linear_fc1)
        return recompute_activation(self, self.activation, x_sbm, self.linear_fc2)


def recompute_activation(module: MegatronModule, cheap: Callable, x: Tensor, linear: nn.Module):
    """linear(cheap(x)); under selective recompute the result of `cheap` is not kept for backward
    but made again from x. Norms and activations are cheap beside the memory that they cost."""
    selective = module.config.recompute_granularity == "selective"
    # Where x has no gradient (all before is frozen), a recomputed norm's weights would have none.
    if not (selective and module.training and torch.is_grad_enabled() and x.requires_grad):
        return linear(cheap(x))
    checkpoint = CheckpointWithoutOutput(fp8=None)
    output = linear(checkpoint.checkpoint(cheap, x))
    product = output[0] if isinstance(output, tuple) else output
    checkpoint.discard_output_and_register_recompute(product)
    return output


class ResidualAdd(nn.Module):
    """residual + layer_scale · (x + bias): megatron-core's "bias, dropout, add" without dropout."""

    def __init__(self, config: TransformerConfig, layer_scale: float | None):
        super().__init__()
        self.gamma = None
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
            mark_sequence_parallel(self, config)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return self.add

    def add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float):
        x, bias = x_with_bias
        if bias is not None:
            x = x + bias
        return residual + (x if self.gamma is None else x * self.gamma)


def mark_sequence_parallel(module: nn.Module, config: TransformerConfig) -> None:
    """Tag parameters whose gradient on a rank covers only that rank's tokens."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel


def enter_sequence_parallel(x_sbh: Tensor, config: TransformerConfig, group: ProcessGroup):
    """[s, b, h] -> [S, b, h]: pad to a multiple of the tensor size, keep this rank's part."""
    if not config.sequence_parallel:
        return x_sbh
    x_Sbh = scatter_to_sequence_parallel_region(pad_to_multiple(x_sbh, group.size()), group=group)
    return x_Sbh.clone()  # a view would keep the whole sequence for backward


def leave_sequence_parallel(x_Sbh: Tensor, tokens: int, config, group: ProcessGroup) -> Tensor:
    """[S, b, h] -> [s, b, h]: all tokens on every rank, the padding gone.

    What follows is computed alike on every tensor rank, so its gradients are split and not summed.
    """
    if not config.sequence_parallel:
        return x_Sbh
    gathered = gather_from_sequence_parallel_region(
        x_Sbh, tensor_parallel_output_grad=False, group=group
    )
    return gathered[:tokens]


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Append zero tokens up to the next multiple of `size`."""
    missing = -x.shape[0] % size
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


class _QuickGelu(torch.autograd.Function):
    """x · sigmoid(1.702 x), saving only x: autograd would save three tensors of its size."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return grad * (gate + 1.702 * x * gate * (1 - gate))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _QuickGelu.apply,
}
