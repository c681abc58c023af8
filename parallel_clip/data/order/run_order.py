"""The order of the samples of a run whose phases have different sources, put together from the
orders of these: a pure function of the position, as each of them is.

Sources that are blended with the same weights have one order, which begins with its first sample in
the first phase that has them, and goes on in a later one where it stopped. Phases change between
two batches, so a place in a batch is of the same stream in all orders of a run, and a machine reads
the same few streams of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from parallel_clip.data.order.permutation import name_to_int
from parallel_clip.data.order.sample_order import Addresses, Order, SampleAddress


class Stretch(NamedTuple):
    """The positions of a run from `first` to the next stretch, or to the end, are those of the
    order of number `order` from `begin` on."""

    first: int
    order: int
    begin: int


ONE_ORDER = (Stretch(0, 0, 0),)  # a run whose phases all have the same sources


def find_stretches(parts: Iterable[tuple[int, int]]) -> tuple[Stretch, ...]:
    """parts: the first position and the order of each phase of a run, from position 0 on. Phases
    that follow one another with one order are one stretch."""
    found: list[Stretch] = []
    taken: Counter[int] = Counter()  # positions of each order
    for first, order in parts:
        if found and found[-1].order == order:
            continue
        if found:
            taken[found[-1].order] += first - found[-1].first
        found.append(Stretch(first, order, taken[order]))
    return tuple(found)


def taken_by(stretches: Sequence[Stretch], position: int) -> Counter[int]:
    """How many of the first so many positions of a run are of each order."""
    stops = [*(stretch.first for stretch in stretches[1:]), position]
    taken: Counter[int] = Counter()
    for stretch, stop in zip(stretches, stops, strict=True):
        taken[stretch.order] += max(0, min(stop, position) - stretch.first)
    return taken


def order_seed(seed: int, number: int) -> int:
    """The seed of the order of number `number` of a run: of the first that of the run; of the
    others another one, as orders of one seed and equally many samples would take them from the same
    places."""
    return seed if number == 0 else name_to_int(seed, "order", number)


class RunOrder:
    """All orders of a run, one after the other. seed: of the run."""

    def __init__(self, orders: Sequence[Order], stretches: Sequence[Stretch], seed: int):
        self.orders = orders
        self.seed = seed
        self._stretches = stretches
        self._firsts = np.array([stretch.first for stretch in stretches], np.int64)

    def at(self, position: int) -> SampleAddress:
        """The sample at `position` of the run. `epoch` counts the passes of its own order."""
        order, own = self._find(position)
        return order.at(own)

    def of_positions(self, positions: np.ndarray) -> Addresses:
        """The samples at many positions of the run, int64 [n]."""
        positions = np.asarray(positions, np.int64)
        found = Addresses(*(np.empty_like(positions) for _ in Addresses._fields))
        numbers = np.searchsorted(self._firsts, positions, side="right") - 1
        for number in np.unique(numbers):
            here, stretch = numbers == number, self._stretches[number]
            own = positions[here] - stretch.first + stretch.begin
            for whole, part in zip(
                found, self.orders[stretch.order].of_positions(own), strict=True
            ):
                whole[here] = part
        return found

    def substitute(self, position: int, attempt: int) -> SampleAddress:
        """The sample that stands in for a bad one at `position`, at try 1, 2, ...: of the same
        epoch of the same order (`Order.substitute`)."""
        order, own = self._find(position)
        return order.at(order.substitute(own, attempt))

    def _find(self, position: int) -> tuple[Order, int]:
        """The order of a position of the run, and the position in it."""
        stretch = self._stretches[int(np.searchsorted(self._firsts, position, side="right")) - 1]
        return self.orders[stretch.order], position - stretch.first + stretch.begin
