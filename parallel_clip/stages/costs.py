"""What a model costs: FLOPs of one forward pass of one pair, in training; all that arithmetic on
layouts knows of a model.

Matrix products alone are counted, two operations to a multiply-add; norms, activation functions,
softmax and table look-ups are negligible beside them. The backward pass multiplies each product's
gradient by both of its factors, hence costs twice the forward (Narayanan et al., "Efficient
Large-Scale Language Model Training on GPU Clusters", arXiv 2104.04473, appendix).
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel_clip.stages.stage import LayerRange, Stage


@dataclass(frozen=True)
class TowerCosts:
    """A tower of `layers` equal blocks. FLOPs, forward, of one picture or one text: `embedding`
    before the first block, `block` in each block, `head` after the last one.

    tensor_sizes: what tensor parallelism splits and must divide, each with its name in messages,
    such as ("heads", 12).
    """

    layers: int
    embedding: int
    block: int
    head: int
    tensor_sizes: tuple[tuple[str, int], ...]

    def of(self, held: LayerRange) -> int:
        """FLOPs of one stage's part of the tower."""
        return (
            held.layers * self.block
            + held.has_embedding * self.embedding
            + held.has_head * self.head
        )


@dataclass(frozen=True)
class ModelCosts:
    """Both towers of the model called `name`; `embed_dim` is the width of a feature."""

    name: str
    embed_dim: int
    vision: TowerCosts
    text: TowerCosts


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """FLOPs, forward, of a transformer block: with s tokens, width h and MLP width m, 8sh² (query,
    key, value and output), 4s²h (scores, and their weighted sum of values) and 4shm (MLP).

    Causal attention counts in full: kernels differ in how much of the masked half they skip, and
    at 77 tokens of width 512 that half is 1.2% of a block.
    """
    projections = 8 * tokens * width**2
    attention = 4 * tokens**2 * width
    mlp = 4 * tokens * width * mlp_width
    return projections + attention + mlp


def stage_cost(stage: Stage, costs: ModelCosts) -> int:
    """FLOPs, forward, that one pair costs on `stage`."""
    return costs.vision.of(stage.vision) + costs.text.of(stage.text)
