"""The order of a run whose phases have different sources."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.order.run_order import (
    ONE_ORDER,
    RunOrder,
    Stretch,
    find_stretches,
    order_seed,
    taken_by,
)
from parallel_clip.data.order.sample_order import Order, OrderSource, SampleAddress

BATCH = 4


def order_of(*sources: tuple[int, float], number: int = 0) -> Order:
    """Of (samples, weight) of each source."""
    listed = [OrderSource([samples], weight) for samples, weight in sources]
    return Order(listed, order_seed(5, number), BATCH)


ORDERS = [
    order_of((12, 1.0), (0, 0.0), (7, 0.0)),
    order_of((12, 0.5), (0, 0.0), (7, 2.0), number=1),
    order_of((12, 1.0), (0, 0.0), (7, 0.0), number=2),
]


@cache
def sample_of(number: int, position: int) -> SampleAddress:
    return ORDERS[number].at(position)


def test_an_order_goes_on_where_it_stopped():
    parts = [(0, 0), (8, 1), (20, 0), (24, 0), (28, 2), (36, 1)]
    assert find_stretches(parts) == (
        Stretch(0, 0, 0),
        Stretch(8, 1, 0),
        Stretch(20, 0, 8),
        Stretch(28, 2, 0),
        Stretch(36, 1, 12),
    )
    assert find_stretches([(0, 0), (8, 0)]) == ONE_ORDER


def plain(parts: list[tuple[int, int]], stop: int) -> list[tuple]:
    """One position after the other: the next sample of the order of its phase."""
    samples, taken = [], Counter()
    for position in range(stop):
        number = [order for first, order in parts if first <= position][-1]
        samples.append(sample_of(number, taken[number]))
        taken[number] += 1
    return samples


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=6))
def test_each_position_is_the_next_sample_of_its_phases_order(phases):
    firsts = np.cumsum([0] + [BATCH * steps for steps, _ in phases]).tolist()
    parts = [(first, order) for first, (_, order) in zip(firsts, phases, strict=False)]
    stretches = find_stretches(parts)
    order = RunOrder(ORDERS, stretches, 5)
    wanted = plain(parts, firsts[-1] + 40)
    assert [order.at(position) for position in range(0, len(wanted), 5)] == wanted[::5]
    asked = np.random.default_rng(0).permutation(len(wanted))
    found = order.of_positions(asked)
    assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == [wanted[p] for p in asked]
    for position in (0, firsts[-1] // 2, len(wanted)):
        numbers = [[o for f, o in parts if f <= p][-1] for p in range(position)]
        assert taken_by(stretches, position) == Counter(numbers)


def test_phases_apart_are_one_epoch():
    order = RunOrder(ORDERS, find_stretches([(0, 0), (8, 1), (32, 0)]), 5)
    first = order.of_positions(np.array([*range(8), *range(32, 36)]))
    assert sorted(first.index.tolist()) == list(range(12)) and set(first.source) == {0}
    between = order.of_positions(np.arange(8, 28))  # an epoch of the second: 6 and 2 x 7
    times = Counter(zip(between.source.tolist(), between.index.tolist(), strict=True))
    assert {key: n for key, n in times.items() if key[0] == 2} == {(2, n): 2 for n in range(7)}
    assert sum(n for key, n in times.items() if key[0] == 0) == 6 == len(times) - 7
    assert set(between.epoch) == {0} and order.at(28).epoch == 1


def test_a_run_of_one_order_is_that_order():
    (order,) = orders = [order_of((40, 1.5))]
    whole = RunOrder(orders, ONE_ORDER, 5)
    positions = np.arange(150)
    for ours, theirs in zip(
        whole.of_positions(positions), order.of_positions(positions), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert whole.seed == order.seed == 5


@pytest.mark.parametrize("position", [0, 7, 8, 30, 36, 200])
def test_a_substitute_is_of_the_same_epoch_of_the_same_order(position):
    order = RunOrder(ORDERS, find_stretches([(0, 0), (8, 1), (32, 0)]), 5)
    wanted = {0} if position < 8 or position >= 32 else {0, 2}
    found = [order.substitute(position, attempt) for attempt in range(1, 12)]
    assert {address.source for address in found} <= wanted
    assert {address.epoch for address in found} == {order.at(position).epoch}
    assert wanted == {0} or {address.source for address in found} == wanted
    assert len({address[1:3] for address in found}) > 5


def test_orders_of_equally_many_samples_begin_at_others():
    one, other = (order_of((1000, 1.0), number=number) for number in (0, 1))
    first = [order.of_positions(np.arange(100)).index for order in (one, other)]
    assert np.mean(first[0] == first[1]) < 0.05
    assert order_seed(5, 1) != order_seed(5, 2) != order_seed(6, 2)
