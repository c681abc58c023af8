"""Seconds of messages and collectives, and which links a group of ranks has between its members.

n ranks that pass pieces around a ring send (n - 1) / n of the whole each for an all-gather or a
reduce-scatter and twice that for an all-reduce (Thakur, Rabenseifner and Gropp, "Optimization of
Collective Communication Operations in MPICH", 2005); latency is that of log2 n messages, as in the
trees that libraries take for small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log2
from typing import TYPE_CHECKING, Literal

from parallel_clip.errors import InputError

if TYPE_CHECKING:
    from parallel_clip.layout import Layout
    from parallel_clip.plan.device_file import Device, Link


@dataclass(frozen=True)
class Route:
    """Between neighbours of a group. bandwidth: bytes a second that each rank sends."""

    bandwidth: float
    latency: float

    def message(self, size: float) -> float:
        """One rank sends `size` bytes to another."""
        return self.latency + size / self.bandwidth if size else 0.0

    def all_gather(self, size: float, ranks: int) -> float:
        """All `ranks` hold the `size` bytes afterwards of which each had its part; so does a
        reduce-scatter the other way."""
        if ranks == 1 or not size:
            return 0.0
        return ring_bytes(size, ranks) / self.bandwidth + self.latency * ceil(log2(ranks))

    def all_reduce(self, size: float, ranks: int) -> float:
        """The sum of `size` bytes over `ranks`, on all of them."""
        return 2 * self.all_gather(size, ranks)

    def broadcast(self, size: float, ranks: int) -> float:
        """`size` bytes from one rank to all."""
        return 0.0 if ranks == 1 else size / self.bandwidth + self.latency * ceil(log2(ranks))


NO_ROUTE = Route(inf, 0.0)  # of a rank alone


def ring_bytes(size: float, ranks: int) -> float:
    """What each of `ranks` sends in an all-gather of `size` bytes."""
    return size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Routes:
    """The links of a layout's groups: ranks in megatron-core's order, tensor fastest, then data,
    then pipeline; `nodes_of` GPUs in a node, each with one link out of it.

    Raises:
        InputError: links between nodes are needed, and the device file has none.
    """

    device: Device
    layout: Layout
    nodes_of: int

    @property
    def tensor(self) -> Route:
        return self._route(1, self.layout.tensor)

    @property
    def data(self) -> Route:
        return self._route(self.layout.tensor, self.layout.data)

    @property
    def pipeline(self) -> Route:
        """Between a stage and the next: of all boundaries the slowest, which paces the others."""
        return self._route(self.layout.tensor * self.layout.data, self.layout.pipeline)

    @property
    def model(self) -> Route:
        """Of all ranks of a copy of the model."""
        return min(self.tensor, self.pipeline, key=lambda route: route.bandwidth)

    @property
    def world(self) -> Route:
        return self._route(1, self.layout.world)

    def _route(self, stride: int, ranks: int) -> Route:
        """Of a group of `ranks` that are `stride` apart. One that spans nodes goes out of each by
        as many links as it has members there."""
        if ranks == 1:
            return NO_ROUTE
        inside = self._link("inside", "within a node")
        bandwidth = inside.bandwidth * inside.reached
        fits = stride * ranks <= self.nodes_of and self.nodes_of % (stride * ranks) == 0
        if self.layout.world <= self.nodes_of or fits:
            return Route(bandwidth, inside.latency)
        between = self._link("between", "between nodes")
        members = max(1, self.nodes_of // stride)
        outside = members * between.bandwidth * between.reached
        return Route(min(bandwidth, outside), between.latency)

    def _link(self, section: Literal["inside", "between"], where: str) -> Link:
        found = getattr(self.device, section)
        if found is None:
            raise InputError(
                f"{self.layout.world} GPUs with {self.nodes_of} in a node need links {where}, and "
                f"the device file of {self.device.name} has no section `{section}`; add one: "
                f"{section}: {{bandwidth: 50e9, reached: 0.9, latency: 2e-5}}, with a line in "
                "`sources`, or measure with `parallel-clip plan --calibrate FILE` under torchrun"
            )
        return found
