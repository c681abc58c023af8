"""How a parameter is described: names, full shape, initial value, weight decay, and how it lies on
the tensor-parallel ranks.

A parameter's *global name* is its name in an OpenCLIP state dict, and its *full shape* the one it
has there. Everything that must not depend on the layout (initial values, checkpoints, conversion,
weight decay) speaks of parameters by this name and shape. A model's table of them is made in
architecture.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.stages.costs import units_per_rank


@dataclass(frozen=True)
class Segment:
    """`length` rows that lie at `whole` in the full tensor and at `local` in a rank's part."""

    whole: int
    local: int
    length: int


@dataclass(frozen=True)
class Placement:
    """How a full tensor lies on the tensor-parallel ranks.

    axis: the axis that is split; None where every rank holds the whole.
    blocks: the axis consists of so many equal blocks, each of which is split by itself
        (3 for OpenCLIP's [query; key; value]).
    unit: so many neighbouring entries of a block stay on one rank (the width of a head).

    Where the size does not divide the units of a block, each rank's part of it is as long as
    `units_per_rank` units, and those that are not there are padding: zeros in weights, gradients
    and Adam's moments. They stay zero in training (docs/decisions.md).
    """

    axis: int | None = None
    blocks: int = 1
    unit: int = 1

    def segments(self, length: int, rank: int, size: int) -> list[Segment]:
        """Where the split axis, `length` long in full, lies on `rank` of `size` ranks: one segment
        a block, of length 0 where the rank holds padding alone. Padding is in no segment."""
        if self.axis is None:
            raise ValueError("a replicated tensor has no split axis")
        block, units = length // self.blocks, self._units(length)
        share = units_per_rank(units, size)
        first = min(rank * share, units)
        held = min(share, units - first)
        return [
            Segment(i * block + first * self.unit, i * share * self.unit, held * self.unit)
            for i in range(self.blocks)
        ]

    def local_length(self, length: int, size: int) -> int:
        """How long the split axis is on each rank, padding included."""
        return self.blocks * self.unit * units_per_rank(self._units(length), size)

    def _units(self, length: int) -> int:
        return length // (self.blocks * self.unit)

    def local_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The shape of the part of a full tensor that each of `size` ranks holds."""
        if self.axis is None:
            return shape
        length = self.local_length(shape[self.axis], size)
        return *shape[: self.axis], length, *shape[self.axis + 1 :]


WHOLE = Placement()
ROWS = Placement(axis=0)
COLUMNS = Placement(axis=1)


@dataclass(frozen=True)
class Normal:
    """Drawn from a normal distribution of mean 0."""

    std: float


@dataclass(frozen=True)
class TruncatedNormal:
    """Drawn from a normal distribution of mean 0, values beyond two deviations drawn again."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Drawn uniformly from [-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: float


@dataclass(frozen=True)
class Parameter:
    """name: in an OpenCLIP state dict; module: in CLIPModel, layers counted over the whole tower;
    shape: in full; initial: how its first value is made; decayed: whether AdamW's weight decay acts
    on it, by OpenCLIP 3's rule (`optimizer.no_decay` may spare more); placement: on the tensor
    ranks."""

    name: str
    module: str
    shape: tuple[int, ...]
    initial: Normal | TruncatedNormal | Uniform | Constant
    decayed: bool
    placement: Placement = WHOLE

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape that each of `size` tensor ranks holds."""
        return self.placement.local_shape(self.shape, size)


def with_prefix(name: str, module: str, parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    """The same parameters as a part of something larger: both names begin with these prefixes."""
    for part in parameters:
        yield replace(part, name=f"{name}{part.name}", module=f"{module}{part.module}")


@torch.no_grad()
def load_slice(
    tensor: nn.Parameter, parameter: Parameter, whole: Tensor, tensor_group: ProcessGroup
) -> None:
    """Copy this rank's part of the full tensor `whole` into `tensor`."""
    tensor.copy_(local_slice(whole, parameter.placement, tensor_group.rank(), tensor_group.size()))


def local_slice(whole: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """The part of a full tensor that `rank` of `size` tensor ranks holds; zeros where padded."""
    if placement.axis is None or size == 1:
        return whole
    part = whole.new_zeros(placement.local_shape(whole.shape, size))
    return fill_slice(part, placement, whole.shape[placement.axis], rank, size, whole.narrow)


def fill_slice(
    part: Tensor,
    placement: Placement,
    length: int,
    rank: int,
    size: int,
    read_range: Callable[[int, int, int], Tensor],
) -> Tensor:
    """`part` itself, filled with what `rank` of `size` holds of a tensor that is split.

    Args:
        part: of the local shape, zero where padded.
        length: of the split axis, in full.
        read_range: (axis, start, length) -> that range of the full tensor.
    """
    axis = placement.axis
    for segment in placement.segments(length, rank, size):
        part.narrow(axis, segment.local, segment.length).copy_(
            read_range(axis, segment.whole, segment.length)
        )
    return part
