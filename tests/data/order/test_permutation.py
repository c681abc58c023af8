from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.order.permutation import key_of, permuted, subkey


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_each_number_comes_once(size, seed):
    found = permuted(np.arange(size), size, np.uint64(seed))
    assert np.array_equal(np.sort(found), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20), st.data())
def test_a_place_does_not_depend_on_what_else_is_asked(sizes, data):
    places = np.array([data.draw(st.integers(0, size - 1)) for size in sizes])
    keys = subkey(key_of("test"), np.arange(len(sizes)))
    found = permuted(places, np.array(sizes), keys)
    alone = [permuted(places[i : i + 1], sizes[i], keys[i])[0] for i in range(len(sizes))]
    assert found.tolist() == alone
    assert (found < sizes).all() and (found >= 0).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_equally_likely(size):
    """Chi-square over all orders of a few things, against its 99.99% limit."""
    seeds = 24_000
    keys = subkey(key_of("likely"), np.arange(seeds))
    rows = np.stack([permuted(np.full(seeds, i), size, keys) for i in range(size)], axis=1)
    times = Counter(map(tuple, rows.tolist()))
    orders = {2: 2, 3: 6, 4: 24}[size]
    expected = seeds / orders
    chi_square = sum((count - expected) ** 2 / expected for count in times.values())
    assert len(times) == orders
    assert chi_square < {2: 15.1, 3: 25.7, 4: 56.5}[size]


@pytest.mark.parametrize("size", [1000, 4096, 10_007])
def test_large_ones_keep_no_trace_of_the_order(size):
    found = permuted(np.arange(size), size, key_of("large", size))
    assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
    steps = np.abs(np.diff(found))
    assert abs(steps.mean() / (size / 3) - 1) < 0.05
    assert np.mean(steps == 1) < 8 / size


def test_they_are_those_of_every_release():
    assert permuted(np.arange(6), 1000, key_of(7, "blocks")).tolist() == [
        318, 142, 104, 153, 867, 218,
    ]  # fmt: skip
