"""What the parts of a CLIP model cost: FLOPs of one forward pass of one pair, in training.

Matrix products alone are counted, two operations to a multiply-add; norms, activation functions,
softmax and table look-ups are negligible beside them. The backward pass multiplies each product's
gradient by both of its factors, hence costs twice the forward (Narayanan et al., "Efficient
Large-Scale Language Model Training on GPU Clusters", arXiv 2104.04473, appendix).

h width, m MLP width, s tokens that pass through the blocks, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_clip.model.architecture import Architecture
    from parallel_clip.model.towers.vision import VisionConfig
    from parallel_clip.stages.stage import LayerRange, Stage


@dataclass(frozen=True)
class TowerCosts:
    """FLOPs, forward, of one picture or one text: before the first block, in each block, after the
    last block."""

    embedding: int
    block: int
    head: int

    def of(self, layers: LayerRange) -> int:
        """Those of one stage's part of the tower."""
        return (
            layers.layers * self.block
            + layers.has_embedding * self.embedding
            + layers.heads * self.head
        )


def vision_costs(architecture: Architecture) -> TowerCosts:
    """The patch convolution, blocks on the patches that patch dropout keeps, the projection."""
    vision = architecture.vision
    return TowerCosts(
        embedding=2 * vision.patches * _values_in_a_patch(vision) * vision.width,
        block=block_flops(1 + vision.patches_kept, vision.width, vision.mlp_width),
        head=2 * vision.width * architecture.embed_dim,
    )


def text_costs(architecture: Architecture) -> TowerCosts:
    """Its embedding is a look-up and costs nothing; only the pooled token is projected."""
    text = architecture.text
    return TowerCosts(
        embedding=0,
        block=block_flops(text.context_length, text.width, text.mlp_width),
        head=2 * text.width * architecture.embed_dim,
    )


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """A transformer block's 8sh² (query, key, value and output), 4s²h (scores, and their weighted
    sum of values) and 4shm (MLP).

    Causal attention counts in full: kernels differ in how much of the masked half they skip, and
    at 77 tokens of width 512 that half is 1.2% of a block.
    """
    projections = 8 * tokens * width**2
    attention = 4 * tokens**2 * width
    mlp = 4 * tokens * width * mlp_width
    return projections + attention + mlp


def stage_cost(stage: Stage, architecture: Architecture) -> int:
    """FLOPs, forward, that one pair costs on `stage`."""
    vision, text = vision_costs(architecture), text_costs(architecture)
    return vision.of(stage.vision) + text.of(stage.text)


def _values_in_a_patch(vision: VisionConfig) -> int:
    height, width = vision.patch_size
    return 3 * height * width
