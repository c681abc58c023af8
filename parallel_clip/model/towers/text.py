"""The text tower: OpenCLIP's own text transformer, split over the tensor-parallel ranks and its
layers over the stages of a pipeline.

Shape letters as in layers.py; D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import (
    SequenceLength,
    enter_sequence_parallel,
    leave_sequence_parallel,
    transformer_block,
)
from parallel_clip.model.parameters import VOCABULARY, Normal, Parameter
from parallel_clip.model.towers.transformer import (
    ZERO,
    BlockInit,
    TowerConfig,
    block_parameters,
    linear_parameters,
    norm_parameters,
)
from parallel_clip.stages.costs import TowerCosts
from parallel_clip.stages.stage import LayerRange


@dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
    """The text tower. `eos_id` matters for pool "eos" alone; `tokenizer` is the name of a Hugging
    Face tokenizer, or None for OpenCLIP's own."""

    context_length: int
    vocab_size: int
    pool: Literal["argmax", "last", "eos", "first"]
    causal: bool
    eos_id: int
    projection_bias: bool
    tokenizer: str | None
    tokenizer_kwargs: dict[str, Any] = field(hash=False)

    @property
    def tokens(self) -> int:
        return self.context_length

    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        width = self.width
        name, shape = "token_embedding.weight", (self.vocab_size, width)
        yield Parameter(name, name, shape, Normal(0.02), decayed=True, placement=VOCABULARY)
        name, shape = "positional_embedding", (self.context_length, width)
        yield Parameter(name, name, shape, Normal(0.01), decayed=True)
        output = Normal((2 * self.layers * width) ** -0.5)
        init = BlockInit(
            query_key_value=Normal(width**-0.5),
            attention_output=output,
            mlp_input=Normal((2 * width) ** -0.5),
            mlp_output=output,
        )
        yield from block_parameters(self, init)
        yield from norm_parameters("ln_final", "post_norm", width)
        name, module, normal = "text_projection", "projection", Normal(width**-0.5)
        if self.projection_bias:
            shape = embed_dim, width
            yield from linear_parameters(f"{name}.", f"{module}.", shape, normal, ZERO)
        else:
            yield Parameter(name, module, (width, embed_dim), normal, decayed=True)

    def costs(self, embed_dim: int) -> TowerCosts:
        """The embedding is a look-up and costs nothing; only the pooled token is projected."""
        return self.tower_costs(embedding=0, head=2 * self.width * embed_dim)

    @property
    def module_class(self) -> type[nn.Module]:
        return TextTower


class TextTower(nn.Module):
    """Token ids [b, s] -> features [b, D], not normalised; or the layers of it that `layer_range`
    says: from token ids or hidden states [S, b, h], to hidden states or features."""

    def __init__(
        self,
        text: TextConfig,
        embed_dim: int,
        config: TransformerConfig,
        tensor_group: ProcessGroup,
        layer_range: LayerRange,
    ):
        super().__init__()
        self.text, self.config, self.group = text, config, tensor_group
        self.layer_range = layer_range
        if layer_range.has_embedding:
            self._build_embedding()
        tokens = SequenceLength(text.training_tokens, text.tokens)
        self.block = transformer_block(config, tokens, text.causal, text.layer_scale, tensor_group)
        if layer_range.has_head:
            self._build_head(embed_dim)

    def _build_embedding(self) -> None:
        text, config, tensor_group = self.text, self.config, self.group
        width, dtype = text.width, config.params_dtype
        self.token_embedding = VocabParallelEmbedding(
            _padded_vocabulary(text.vocab_size, tensor_group.size()),
            width,
            init_method=None,
            config=config,
            tp_group=tensor_group,
        )
        self.positional_embedding = nn.Parameter(
            torch.empty(text.context_length, width, dtype=dtype)
        )

    def _build_head(self, embed_dim: int) -> None:
        text = self.text
        width, dtype = text.width, self.config.params_dtype
        self.post_norm = nn.LayerNorm(width, eps=text.norm_eps, dtype=dtype)
        if text.projection_bias:
            self.projection = nn.Linear(width, embed_dim, dtype=dtype)
        else:
            self.projection = nn.Parameter(torch.empty(width, embed_dim, dtype=dtype))

    def forward(self, x: Tensor, tokens_bs: Tensor) -> Tensor:
        """x: the hidden states [S, b, h] to go on from; not used where the embedding is held."""
        if self.layer_range.has_embedding:
            x = self.embed(tokens_bs)
        x = self.block(x, attention_mask=None)
        return self.head(x, tokens_bs) if self.layer_range.has_head else x

    def embed(self, tokens_bs: Tensor) -> Tensor:
        """[b, s] -> [S, b, h]"""
        x_bsh = self.token_embedding(tokens_bs) + self.positional_embedding
        x_sbh = x_bsh.transpose(0, 1).contiguous()
        return enter_sequence_parallel(x_sbh, self.config, self.group)

    def head(self, x_Sbh: Tensor, tokens_bs: Tensor) -> Tensor:
        """[S, b, h] -> [b, D]"""
        x_sbh = leave_sequence_parallel(x_Sbh, self.text.context_length, self.config, self.group)
        pairs = torch.arange(x_sbh.shape[1], device=x_sbh.device)
        # The norm is per token: only the pooled one needs it.
        pooled_bh = self.post_norm(x_sbh[self._pooled_index(tokens_bs), pairs])
        if self.text.projection_bias:
            return self.projection(pooled_bh)
        return pooled_bh @ self.projection

    def _pooled_index(self, tokens_bs: Tensor) -> Tensor:
        """The place of the token that stands for the text: int64 [b]."""
        match self.text.pool:
            case "argmax":  # OpenCLIP's tokenizer gives its end-of-text the highest id
                return tokens_bs.argmax(dim=-1)
            case "eos":
                return (tokens_bs == self.text.eos_id).int().argmax(dim=-1)
            case "last":
                return torch.full_like(tokens_bs[:, 0], self.text.context_length - 1)
            case "first":
                return torch.zeros_like(tokens_bs[:, 0])
        raise ValueError(f"unknown pool {self.text.pool!r}")


def _padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    return -(-vocab_size // tensor_size) * tensor_size
