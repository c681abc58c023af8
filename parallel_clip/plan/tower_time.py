"""Seconds of a tower's parts on one tensor rank, for one microbatch.

Products and attention are those of model/layers.py. Passes over memory are counted from it as well,
in numbers that eager PyTorch reads and writes, kernel by kernel. Shape letters as there: s tokens,
S tokens on this rank, b pairs, h width; here a are the channels of this rank's heads, and m of its
MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from parallel_clip.plan.collective_time import Route
from parallel_clip.plan.kernel_time import Kernels
from parallel_clip.stages.costs import TowerCosts, units_per_rank
from parallel_clip.stages.stage import LayerRange

if TYPE_CHECKING:
    from parallel_clip.model.towers.transformer import TowerConfig

# Operations that the host starts for a block.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 12, 30


@dataclass(frozen=True)
class Seconds:
    """compute: of kernels; tensor: of communication between tensor ranks during which nothing is
    computed."""

    compute: float = 0.0
    tensor: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.tensor

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.tensor + other.tensor)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(times * self.compute, times * self.tensor)

    __rmul__ = __mul__


NOTHING = Seconds()


@dataclass(frozen=True)
class How:
    """How a microbatch of `pairs` runs on a rank of `tensor`; sequence: with sequence parallelism;
    recompute: none, selective or full; route: between the tensor ranks."""

    kernels: Kernels
    pairs: int
    tensor: int
    sequence: bool
    recompute: str
    route: Route


@dataclass(frozen=True)
class TowerTime:
    """Of one block: forward, the gradients of its input with what is recomputed for them, those of
    its matrices; of what is before the first block and after the last: forward and backward."""

    block: Seconds
    input_gradients: Seconds
    matrix_gradients: Seconds
    embedding: tuple[Seconds, Seconds]
    head: tuple[Seconds, Seconds]

    def forward(self, held: LayerRange) -> Seconds:
        """Of what a stage holds of the tower."""
        return (
            held.layers * self.block
            + held.has_embedding * self.embedding[0]
            + held.has_head * self.head[0]
        )

    def backward(self, held: LayerRange, costs: TowerCosts) -> Seconds:
        """As `TowerCosts.backward` counts FLOPs, of which `costs` says what is frozen."""
        frozen = costs.frozen
        if frozen.whole:
            return NOTHING

        def trained(first: int) -> int:
            return held.stop - min(max(first, held.first), held.stop)

        return (
            trained(frozen.without_backward) * self.input_gradients
            + trained(frozen.matrices) * self.matrix_gradients
            + (held.has_embedding and not frozen.embedding) * self.embedding[1]
            + held.has_head * self.head[1]
        )


@cache
def tower_time(tower: TowerConfig, costs: TowerCosts, how: How) -> TowerTime:
    """costs: of the tower, from which embedding and head are taken."""
    embedding, head = _embedding(tower, costs, how), _head(tower, costs, how)
    return TowerTime(*_block(tower, how), embedding, head)


def _block(tower: TowerConfig, how: How) -> tuple[Seconds, Seconds, Seconds]:
    kernels, b, t, s, h = how.kernels, how.pairs, how.tensor, tower.training_tokens, tower.width
    a = units_per_rank(tower.heads, t) * tower.head_width
    m = units_per_rank(tower.mlp_width, t)
    local = -(-s // t) if how.sequence and t > 1 else s
    rows = b * (local * t if how.sequence and t > 1 else s)
    products = [(3 * a, h), (h, a), (m, h), (h, m)]  # columns, inner: qkv, output, MLP
    forward = [kernels.product(rows, *product) for product in products]
    to_input = [kernels.product(rows, inner, columns) for columns, inner in products]
    to_matrix = [kernels.product(inner, columns, rows) for columns, inner in products]

    scaled = tower.layer_scale is not None
    # Two norms, two residual sums, the layer scales, and the biases that are added apart.
    passes = b * local * h * (4 + 6 + 4 * scaled + 4 * (t > 1))
    passes += 2 * b * s * a + (t > 1) * 2 * rows * (3 * a + m)
    norms, activation = kernels.streaming(4 * b * local * h), kernels.activating(2 * rows * m)
    compute = sum(forward) + kernels.attention(b, s, a) + kernels.streaming(passes) + activation
    # Backward norms read input and gradient twice. Gradients of queries, keys and values are put
    # together, and into a zeroed tensor for the padding that was cut off.
    passes = b * local * h * (10 + 6 + 10 * scaled)
    passes += b * s * a * (2 + 15) + rows * (3 * a + m + 2 * h)
    back = sum(to_input) + kernels.attention(b, s, a, backward=True)
    back += kernels.streaming(passes) + kernels.activating(3 * rows * m)
    if how.recompute == "selective":
        back += norms + activation
    weights = sum(columns * inner for columns, inner in products)
    # Added to the fp32 gradients that DDP keeps.
    added = kernels.streaming(weights * (kernels.element + 8) / kernels.element)
    matrices = _overheads(sum(to_matrix) + added, how)

    sent, exposed = _block_communication(h * rows * kernels.element, to_input, to_matrix, how)
    # The host cannot start operations quicker, whatever they are.
    operation = _overheads(kernels.device.operation_seconds, how)
    compute = max(_overheads(compute, how), FORWARD_OPERATIONS * operation - sent)
    back = max(_overheads(back, how), BACKWARD_OPERATIONS * operation - matrices - exposed)
    block, input_gradients = Seconds(compute, sent), Seconds(back, exposed)
    if how.recompute == "full":
        input_gradients += block
    return block, input_gradients, Seconds(matrices)


def _block_communication(
    size: float, to_input: list[float], to_matrix: list[float], how: How
) -> tuple[float, float]:
    """Forward and backward, as far as nothing is computed meanwhile. size: bytes of the hidden
    states of all tensor ranks.

    Forward: two all-reduces, or under sequence parallelism an all-gather and a reduce-scatter for
    each. Backward the same volume; megatron-core sums the gradient of a column-parallel layer's
    input while it computes that of its matrix, and under sequence parallelism gathers the input
    again while it computes the gradient of the input.
    """
    reduce, gather = (of(size, how.tensor) for of in (how.route.all_reduce, how.route.all_gather))
    if not how.sequence:
        return 2 * reduce, sum(max(0.0, reduce - to_matrix[layer]) for layer in (0, 2))
    backward = 2 * gather  # of the gradient of the row-parallel layers' outputs
    for layer in (0, 2):
        backward += max(0.0, gather - to_input[layer]) + max(0.0, gather - to_matrix[layer])
    return 4 * gather, backward


def _embedding(tower: TowerConfig, costs: TowerCosts, how: How) -> tuple[Seconds, Seconds]:
    """Pictures: the patch convolution, whose only gradient is that of its matrix. Texts: a look-up,
    summed over the tensor ranks that each hold a part of the words, and its dense gradient."""
    kernels, states = how.kernels, how.pairs * tower.training_tokens * tower.width
    forward = kernels.product_of_flops(how.pairs * costs.embedding) + kernels.streaming(7 * states)
    backward = kernels.product_of_flops(how.pairs * costs.embedding) + kernels.streaming(7 * states)
    size, sent = kernels.element * states, 0.0
    vocabulary = getattr(tower, "vocab_size", 0)
    if vocabulary:
        sent = how.route.all_reduce(size, how.tensor)
        table = units_per_rank(vocabulary, how.tensor) * tower.width
        backward += kernels.streaming(table * (2 * kernels.element + 8) / kernels.element)
    gathered = how.route.all_gather(size, how.tensor) if how.sequence else 0.0
    return (
        Seconds(_overheads(forward, how), sent),
        Seconds(_overheads(backward, how), gathered),
    )


def _head(tower: TowerConfig, costs: TowerCosts, how: How) -> tuple[Seconds, Seconds]:
    """Its products are taken as one; those of the attention pool are split."""
    kernels, states = how.kernels, how.pairs * tower.training_tokens * tower.width
    split = sum(units.count * units.flops for units in costs.padded(how.tensor).head_units)
    flops = how.pairs * (costs.unsplit_head + split / how.tensor)
    forward = kernels.product_of_flops(flops) + kernels.streaming(2 * states)
    backward = 2 * kernels.product_of_flops(flops) + kernels.streaming(3 * states)
    gathered = how.route.all_gather(kernels.element * states, how.tensor) if how.sequence else 0.0
    return Seconds(_overheads(forward, how), gathered), Seconds(_overheads(backward, how))


def _overheads(seconds: float, how: How) -> float:
    return how.kernels.device.overhead * seconds
