"""What a model costs: FLOPs of one forward pass of one pair (a picture with its text or texts), in
training; all that arithmetic on layouts knows of a model.

Matrix products alone are counted, two operations to a multiply-add; norms, activation functions,
softmax and table look-ups are negligible beside them. The backward pass multiplies each product's
gradient by both of its factors, hence costs twice the forward (Narayanan et al., "Efficient
Large-Scale Language Model Training on GPU Clusters", arXiv 2104.04473, appendix). What is frozen
saves part of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from parallel_clip.stages.stage import LayerRange, Stage


def units_per_rank(units: int, tensor: int) -> int:
    """How many of `units` heads, MLP channels or words each of `tensor` ranks has room for. Where
    `tensor` does not divide them, the last ranks hold fewer or none, and padding for the rest."""
    return -(-units // tensor)


@dataclass(frozen=True)
class SplitUnits:
    """What tensor ranks split and leave whole one by one: `count` of `name` (in messages), such as
    12 "heads", of `flops` each, forward, of one picture or one text."""

    name: str
    count: int
    flops: int

    def padded(self, tensor: int) -> SplitUnits:
        """As many as `tensor` ranks compute, padding included."""
        return replace(self, count=tensor * units_per_rank(self.count, tensor))


@dataclass(frozen=True)
class FrozenLayers:
    """What of a tower is not trained, as far as it saves work.

    embedding: its matrices are frozen; without_backward: so many layers, counted from the first,
    have nothing trained in or before them; matrices: the matrices of so many are frozen, so that
    backward computes the gradient of their input alone; whole: nothing of the tower is trained.
    """

    embedding: bool = False
    without_backward: int = 0
    matrices: int = 0
    whole: bool = False


@dataclass(frozen=True)
class TowerCosts:
    """A tower of `layers` equal blocks. FLOPs, forward, of one picture or one text: `embedding`
    before the first block, those of `block_units` in each block, and after the last one
    `unsplit_head` and those of `head_units`. `frozen`: what is not trained."""

    layers: int
    embedding: int
    block_units: tuple[SplitUnits, ...]
    unsplit_head: int
    head_units: tuple[SplitUnits, ...] = ()
    frozen: FrozenLayers = FrozenLayers()

    @property
    def block(self) -> int:
        """FLOPs of each block."""
        return _flops(self.block_units)

    @property
    def head(self) -> int:
        """FLOPs after the last block."""
        return self.unsplit_head + _flops(self.head_units)

    @property
    def total(self) -> int:
        return self.of(LayerRange(0, self.layers, self.layers))

    @property
    def split_units(self) -> tuple[SplitUnits, ...]:
        """All that tensor ranks split."""
        return self.block_units + self.head_units

    def padded(self, tensor: int) -> TowerCosts:
        """With the zeros that `tensor` ranks multiply where they do not divide the tower; the same
        costs where they do."""
        return replace(
            self,
            block_units=tuple(units.padded(tensor) for units in self.block_units),
            head_units=tuple(units.padded(tensor) for units in self.head_units),
        )

    def on_tensor_ranks(self, tensor: int) -> TowerCosts:
        """What `tensor` ranks compute together: beside padding, the embedding and the unsplit part
        of the head as often as there are ranks, as each of them computes these whole."""
        return replace(
            self.padded(tensor),
            embedding=tensor * self.embedding,
            unsplit_head=tensor * self.unsplit_head,
        )

    def times(self, count: int) -> TowerCosts:
        """Of so many pictures or texts."""

        def each(units: tuple[SplitUnits, ...]) -> tuple[SplitUnits, ...]:
            return tuple(replace(one, flops=count * one.flops) for one in units)

        return replace(
            self,
            embedding=count * self.embedding,
            block_units=each(self.block_units),
            unsplit_head=count * self.unsplit_head,
            head_units=each(self.head_units),
        )

    def of(self, held: LayerRange) -> int:
        """FLOPs of one stage's part of the tower, forward."""
        return (
            held.layers * self.block
            + held.has_embedding * self.embedding
            + held.has_head * self.head
        )

    def backward(self, held: LayerRange) -> int:
        """FLOPs of its backward pass: of each product the gradients of both factors, or of the
        input alone where the matrix is frozen, or none where nothing before it is trained."""
        if self.frozen.whole:
            return 0
        first, matrices = self.frozen.without_backward, self.frozen.matrices
        gradients_of_inputs = held.stop - min(max(first, held.first), held.stop)
        gradients_of_matrices = held.stop - min(max(matrices, held.first), held.stop)
        return (
            (gradients_of_inputs + gradients_of_matrices) * self.block
            + 2 * (held.has_embedding and not self.frozen.embedding) * self.embedding
            + 2 * held.has_head * self.head
        )

    def again(self, held: LayerRange) -> int:
        """FLOPs of its second forward pass in a step of two: the features of a tower that is frozen
        whole are kept from the first."""
        return 0 if self.frozen.whole else self.of(held)


@dataclass(frozen=True)
class ModelCosts:
    """Both towers of the model called `name`; `embed_dim` is the width of a feature."""

    name: str
    embed_dim: int
    vision: TowerCosts
    text: TowerCosts

    @property
    def total(self) -> int:
        return self.vision.total + self.text.total

    def with_captions(self, count: int) -> ModelCosts:
        """Of a pair that is a picture with so many texts."""
        return replace(self, text=self.text.times(count))

    def padded(self, tensor: int) -> ModelCosts:
        """As `TowerCosts.padded`, of both towers."""
        return replace(self, vision=self.vision.padded(tensor), text=self.text.padded(tensor))

    def on_tensor_ranks(self, tensor: int) -> ModelCosts:
        """As `TowerCosts.on_tensor_ranks`, of both towers: by what stages compare."""
        vision, text = (tower.on_tensor_ranks(tensor) for tower in (self.vision, self.text))
        return replace(self, vision=vision, text=text)


def block_units(
    tokens: int, width: int, heads: int, mlp_width: int
) -> tuple[SplitUnits, SplitUnits]:
    """Heads and MLP channels of a transformer block. With s tokens, width h and MLP width m, the
    block costs 8sh² (query, key, value and output), 4s²h (scores, and their weighted sum of values)
    and 4shm (MLP).

    Causal attention counts in full: kernels differ in how much of the masked half they skip, and
    at 77 tokens of width 512 that half is 1.2% of a block.
    """
    head_width = width // heads
    projections = 8 * tokens * width * head_width
    attention = 4 * tokens**2 * head_width
    of_heads = SplitUnits("heads", heads, projections + attention)
    return of_heads, SplitUnits("MLP channels", mlp_width, 4 * tokens * width)


def _flops(units: Iterable[SplitUnits]) -> int:
    return sum(of_kind.count * of_kind.flops for of_kind in units)


def stage_cost(stage: Stage, costs: ModelCosts) -> int:
    """FLOPs, forward, that one pair costs on `stage`."""
    return costs.vision.of(stage.vision) + costs.text.of(stage.text)


def backward_cost(stage: Stage, costs: ModelCosts) -> int:
    """FLOPs of its backward pass."""
    return costs.vision.backward(stage.vision) + costs.text.backward(stage.text)


def second_forward_cost(stage: Stage, costs: ModelCosts) -> int:
    """FLOPs of its second forward pass, in a step that makes two."""
    return costs.vision.again(stage.vision) + costs.text.again(stage.text)
