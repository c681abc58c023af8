"""Seconds of single operations on a device: matrix products, attention, passes over memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_clip.plan.device_file import Device

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Kernels:
    """The operations of a device in one precision."""

    device: Device
    precision: str

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return BYTES[self.precision]

    def product(self, rows: float, columns: float, inner: float) -> float:
        """Of [rows, inner] with [inner, columns]: arithmetic at the part of the peak that a product
        of its size reaches, or reading and writing its matrices, whichever takes longer."""
        numbers = rows * inner + inner * columns + rows * columns
        return max(
            self.product_of_flops(2 * rows * columns * inner), self.streaming(numbers, parts=1)
        )

    def product_of_flops(self, flops: float) -> float:
        """Arithmetic of one product of so many FLOPs."""
        if not flops:
            return 0.0
        arithmetic = self.device.precision(self.precision)
        return flops / (arithmetic.peak * interpolate(arithmetic.products, flops, 1))

    def attention(
        self, pairs: float, tokens: int, channels: float, backward: bool = False
    ) -> float:
        """softmax(QKᵀ)V of `pairs` sequences over all their `channels`, heads times head width."""
        arithmetic = self.device.precision(self.precision)
        part = interpolate(arithmetic.attention, tokens, 2 if backward else 1)
        flops = (8 if backward else 4) * pairs * tokens**2 * channels
        numbers = (8 if backward else 4) * pairs * tokens * channels
        return max(flops / (arithmetic.peak * part), self.streaming(numbers))

    def streaming(self, numbers: float, parts: float | None = None) -> float:
        """Reads and writes of so many numbers by copies, sums and norms; parts: of the bandwidth
        that they reach, None: what such operations do."""
        part = self.device.streamed if parts is None else parts
        return self.element * numbers / (self.device.memory_bandwidth * part)

    def activating(self, numbers: float) -> float:
        """Reads and writes of so many numbers by activation functions and exponentials."""
        return self.element * numbers / (self.device.memory_bandwidth * self.device.activated)


def interpolate(points: Sequence[Sequence[float]], size: float, column: int) -> float:
    """The value of a `column` at `size`, linear in the logarithm of the size between two points.
    Below the first point it falls with the size, as where an operation takes the same time however
    small it is; above the last it stays."""
    sizes = [point[0] for point in points]
    place = bisect_left(sizes, size)
    if place == len(points):
        return points[-1][column]
    if place == 0:
        return points[0][column] * size / sizes[0]
    (low, high), (before, after) = sizes[place - 1 : place + 1], points[place - 1 : place + 1]
    share = log(size / low) / log(high / low)
    return before[column] + share * (after[column] - before[column])
