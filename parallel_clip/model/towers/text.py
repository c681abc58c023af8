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
from torch import Tensor, nn

from parallel_clip.model.layers import enter_sequence_parallel
from parallel_clip.model.parameters import ROWS, Normal, Parameter
from parallel_clip.model.towers.transformer import (
    OPENCLIP_NAMES,
    ZERO,
    BlockInit,
    TowerConfig,
    TransformerTower,
    block_parameters,
    linear_init,
    linear_parameters,
    norm_parameters,
)
from parallel_clip.stages.costs import TowerCosts


@dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
    """The text tower. `eos_id` matters for pool "eos" alone; `projection`: to features, by a matrix
    [h, D] or a linear layer with its bias, or none; `tokenizer` is the name of a Hugging Face
    tokenizer, or None for OpenCLIP's own."""

    context_length: int
    vocab_size: int
    pool: Literal["argmax", "last", "eos", "first"]
    eos_id: int
    projection: Literal["matrix", "linear", "none"]
    tokenizer: str | None
    tokenizer_kwargs: dict[str, Any] = field(hash=False)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "heads": self.heads,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "pool_type": self.pool,
            "eos_id": self.eos_id if self.pool == "eos" else None,
            "no_causal_mask": not self.causal,
            "proj_type": "none" if self.projection == "none" else "linear",
            "proj_bias": self.projection == "linear",
            "hf_tokenizer_name": self.tokenizer,
            "tokenizer_kwargs": self.tokenizer_kwargs,
        }

    @property
    def tokens(self) -> int:
        return self.context_length

    def parameters(self, embed_dim: int) -> Iterator[Parameter]:
        width = self.width
        name, shape = "token_embedding.weight", (self.vocab_size, width)
        yield Parameter(name, name, shape, Normal(0.02), decayed=True, placement=ROWS)
        name, shape = "positional_embedding", (self.context_length, width)
        yield Parameter(name, name, shape, Normal(0.01), decayed=True)
        output = Normal((2 * self.layers * width) ** -0.5)
        init = BlockInit(
            query_key_value=Normal(width**-0.5),
            attention_output=output,
            mlp_input=Normal((2 * width) ** -0.5),
            mlp_output=output,
            mlp_input_bias=linear_init(width),
            mlp_output_bias=linear_init(self.mlp_width),
        )
        yield from block_parameters(self, OPENCLIP_NAMES, lambda layer: init)
        yield from norm_parameters("ln_final", "post_norm", width)
        name, module, normal = "text_projection", "projection", Normal(width**-0.5)
        if self.projection == "linear":
            shape = embed_dim, width
            yield from linear_parameters(f"{name}.", f"{module}.", shape, normal, ZERO)
        elif self.projection == "matrix":
            yield Parameter(name, module, (width, embed_dim), normal, decayed=True)

    def costs(self, embed_dim: int) -> TowerCosts:
        """The embedding is a look-up and costs nothing; only the pooled token is projected."""
        head = 0 if self.projection == "none" else 2 * self.width * embed_dim
        return self.tower_costs(embedding=0, head=head)

    @property
    def module_class(self) -> type[nn.Module]:
        return TextTower


class TextTower(TransformerTower):
    """From token ids [b, s]; x is not used where the embedding is held."""

    def build_embedding(self) -> None:
        text, size = self.tower, self.group.size()
        self.token_embedding = VocabParallelEmbedding(
            ROWS.local_length(text.vocab_size, size) * size,
            text.width,
            init_method=None,
            config=self.config,
            tp_group=self.group,
        )
        self.positional_embedding = self.empty_parameter(text.context_length, text.width)

    def build_head(self, embed_dim: int) -> None:
        width = self.tower.width
        self.post_norm = self.build_norm()
        if self.tower.projection == "linear":
            self.projection = nn.Linear(width, embed_dim, dtype=self.config.params_dtype)
        elif self.tower.projection == "matrix":
            self.projection = self.empty_parameter(width, embed_dim)

    def embed(self, x: None, tokens_bs: Tensor) -> Tensor:
        x_bsh = self.token_embedding(tokens_bs) + self.positional_embedding
        x_sbh = x_bsh.transpose(0, 1).contiguous()
        return enter_sequence_parallel(x_sbh, self.config, self.group)

    def head(self, x_sbh: Tensor, tokens_bs: Tensor) -> Tensor:
        pairs = torch.arange(x_sbh.shape[1], device=x_sbh.device)
        # The norm is per token: only the pooled one needs it.
        pooled_bh = self.post_norm(x_sbh[self._pooled_index(tokens_bs), pairs])
        match self.tower.projection:
            case "linear":
                return self.projection(pooled_bh)
            case "matrix":
                return pooled_bh @ self.projection
        return pooled_bh

    def _pooled_index(self, tokens_bs: Tensor) -> Tensor:
        """The place of the token that stands for the text: int64 [b]."""
        match self.tower.pool:
            case "argmax":  # OpenCLIP's tokenizer gives its end-of-text the highest id
                return tokens_bs.argmax(dim=-1)
            case "eos":
                return (tokens_bs == self.tower.eos_id).int().argmax(dim=-1)
            case "last":
                return torch.full_like(tokens_bs[:, 0], self.tower.context_length - 1)
            case "first":
                return torch.zeros_like(tokens_bs[:, 0])
        raise ValueError(f"unknown pool {self.tower.pool!r}")
