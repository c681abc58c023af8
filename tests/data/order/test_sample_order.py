from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.order import sample_order
from parallel_clip.data.order.sample_order import (
    MAX_STREAMS,
    SHUFFLE_BLOCK,
    SHUFFLED,
    Order,
    OrderSource,
    SampleAddress,
    stream_count,
)
from parallel_clip.errors import InputError

sources = st.lists(
    st.builds(
        OrderSource,
        shard_samples=st.lists(st.integers(0, 3 * SHUFFLE_BLOCK), min_size=1, max_size=5),
        weight=st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]),
        samples=st.none() | st.integers(1, 4 * SHUFFLE_BLOCK),
    ),
    min_size=1,
    max_size=3,
)


def epoch_of(order: Order, epoch: int) -> list[SampleAddress]:
    n = order.samples_per_epoch
    found = order.of_positions(np.arange(epoch * n, (epoch + 1) * n))
    return [SampleAddress(*a) for a in zip(*map(np.ndarray.tolist, found), strict=True)]


def limited(source: OrderSource) -> int:
    held = sum(source.shard_samples)
    return held if source.samples is None else min(held, source.samples)


@settings(max_examples=40, deadline=None)
@given(
    sources,
    st.integers(0, 2**63),
    st.integers(0, 2),
    st.integers(1, 2000),
    st.sampled_from([16, 64, 1024]),
    st.sampled_from([64, 500, SHUFFLED]),
)
def test_every_sample_comes_as_often_as_its_weight_says(
    sources, seed, epoch, batch, least_stream, shuffled
):
    expected = [round(source.weight * limited(source)) for source in sources]
    if sum(expected) == 0:
        with pytest.raises(InputError, match="no samples"):
            Order(sources, seed, batch)
        return
    sizes = {"LEAST_STREAM": least_stream, "SHUFFLED": shuffled}  # many streams and windows
    with mock.patch.multiple(sample_order, **sizes):
        order = Order(sources, seed, batch)
        addresses = epoch_of(order, epoch)
    assert order.samples_per_epoch == sum(expected)
    assert {address.epoch for address in addresses} == {epoch}
    for number, source in enumerate(sources):
        times = Counter(
            (address.shard, address.index) for address in addresses if address.source == number
        )
        assert sum(times.values()) == expected[number]
        starts = np.cumsum([0, *source.shard_samples])
        for (shard, index), count in times.items():
            assert 0 <= index < source.shard_samples[shard]
            assert starts[shard] + index < limited(source)
            assert int(source.weight) <= count <= int(np.ceil(source.weight))
        if source.weight >= 1:
            assert len(times) == limited(source)


@settings(max_examples=20, deadline=None)
@given(sources, st.integers(0, 100), st.data())
def test_a_position_does_not_depend_on_what_was_asked_before(sources, seed, data):
    if sum(round(source.weight * limited(source)) for source in sources) == 0:
        return
    order = Order(sources, seed, 32)
    positions = data.draw(st.lists(st.integers(0, 4 * order.samples_per_epoch), max_size=20))
    assert [order.at(p) for p in positions] == [Order(sources, seed, 32).at(p) for p in positions]


def test_epochs_and_seeds_have_different_orders():
    source = [OrderSource([400, 300, 300])]
    first, second = epoch_of(Order(source, 1, 8), 0), epoch_of(Order(source, 1, 8), 1)
    other_seed = epoch_of(Order(source, 2, 8), 0)
    without_epoch = [[a[:3] for a in addresses] for addresses in (first, second, other_seed)]
    assert sorted(without_epoch[0]) == sorted(without_epoch[1]) == sorted(without_epoch[2])
    assert without_epoch[0] != without_epoch[1]
    assert without_epoch[0] != without_epoch[2]


def test_the_order_is_the_one_of_every_release():
    """A resumed run continues the order it began with, whatever was updated in between."""
    order = Order([OrderSource([300, 200]), OrderSource([150], weight=1.5)], 7, 32)
    assert [order.at(position)[:3] for position in (0, 1, 2, 724, 725, 100_000)] == [
        (1, 0, 78),
        (0, 1, 45),
        (0, 0, 97),
        (0, 0, 56),
        (0, 1, 15),
        (1, 0, 67),
    ]


def test_samples_are_shuffled_well():
    """No trace of a sample's place in its shard is left in its place in the epoch."""
    order = Order([OrderSource([1000] * 5)], 3, 64)
    places = np.array([1000 * a.shard + a.index for a in epoch_of(order, 0)])
    assert abs(np.corrcoef(places, np.arange(5000))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.005
    assert abs(np.mean(np.abs(np.diff(places))) - 5000 / 3) < 200  # neighbours share a stream


def test_many_at_once_are_those_one_by_one():
    order = Order([OrderSource([300, 0, 200]), OrderSource([150], weight=1.5)], 7, 32)
    positions = np.array([0, 5, 724, 725, 1449, 1450, 3, 10**12])
    found = order.of_positions(positions)
    assert [SampleAddress(*a) for a in zip(*map(np.ndarray.tolist, found), strict=True)] == [
        order.at(position) for position in positions.tolist()
    ]


def test_every_batch_takes_as_much_from_every_stream():
    """Also one that spans two epochs, and where the streams do not divide the batch: a part of the
    batch is the same streams throughout, and reads stretches of shards that no other part reads."""
    n, batch, parts = 100_000, 1000, 8
    order = Order([OrderSource([SHUFFLE_BLOCK * 10] * (n // 1280))], 3, batch)
    n = order.samples_per_epoch
    assert order.streams == 96 and batch % 96 and n % batch
    blocks = [[set(), set()] for _ in range(parts)]
    for step in range(2 * n // batch):
        found = order.of_positions(np.arange(step * batch, (step + 1) * batch))
        places = (found.shard * SHUFFLE_BLOCK * 10 + found.index) // SHUFFLE_BLOCK
        for part, held in enumerate(blocks):
            mine = slice(part * batch // parts, (part + 1) * batch // parts)
            for place, epoch in zip(places[mine].tolist(), found.epoch[mine].tolist(), strict=True):
                held[epoch].add(place)
    every = n // SHUFFLE_BLOCK
    for epoch in (0, 1):
        read = sum(len(held[epoch]) for held in blocks)
        # A block begins in the middle of one that shards' numbers make, and streams cut some.
        assert every <= read < 2.3 * every
        assert all(len(held[epoch]) < 2.3 * every / parts for held in blocks)


@pytest.mark.parametrize(
    "samples, batch, streams",
    [(1, 1, 1), (3071, 64, 1), (3072, 64, 3), (3072, 2, 1), (10**6, 64, 48), (10**6, 4096, 768),
     (2 * 10**6, 1535, 768), (2 * 10**6, 1536, 1536), (10**10, 163_840, MAX_STREAMS)],
)  # fmt: skip
def test_there_are_so_many_streams_that_each_is_in_every_batch(samples, batch, streams):
    assert stream_count(samples, batch) == streams


@pytest.mark.parametrize("shards, streams", [(1, 1), (30, 24), (400, 384), (1600, 1536)])
def test_neighbours_of_a_shard_are_far_apart_in_the_order(shards, streams):
    """About a third of what is shuffled together, as in a perfect shuffle of it."""
    batch = 4096
    order = Order([OrderSource([1000] * shards)], 1, batch)
    assert order.streams == streams
    n = order.samples_per_epoch
    found = order.of_positions(np.arange(n))
    place = np.empty(n, np.int64)
    place[1000 * found.shard + found.index] = np.arange(n)
    apart = np.abs(np.diff(place))
    together = min(n, SHUFFLED)
    assert np.median(apart) > 0.2 * together
    assert np.mean(apart < batch) < 2.5 * batch / together
    assert np.mean(apart == 1) < 6 * max(1, streams / batch) / together * streams


def test_web_scale_is_a_few_numbers_a_shard():
    """2,000,000,000 samples: any position at once, nothing kept but where shards begin."""
    order = Order(
        [OrderSource(np.full(200_000, 10_000)), OrderSource([10_000] * 10, weight=2.5)], 0, 32_768
    )
    assert order.samples_per_epoch == 2_000_250_000
    kept = [part.starts.nbytes for part in order._parts]
    assert sum(kept) < 2 * 2**20
    found = order.of_positions(np.array([0, 1, 2_000_249_999, 2_000_250_000, 10**15]))
    assert found.epoch.tolist() == [0, 0, 0, 1, 10**15 // 2_000_250_000]


def test_the_fraction_of_a_weight_is_another_choice_each_epoch():
    order = Order([OrderSource([1000], weight=0.5)], 0, 16)
    chosen = [{a.index for a in epoch_of(order, epoch)} for epoch in range(40)]
    assert all(len(indices) == 500 for indices in chosen)
    assert 200 < len(chosen[0] & chosen[1]) < 300
    times = Counter(index for indices in chosen for index in indices)
    assert len(times) == 1000 and max(times.values()) <= 34 and min(times.values()) >= 6


def test_substitutes_visit_the_whole_epoch_and_are_no_neighbours():
    order = Order([OrderSource([100])], 0, 8)
    position = 250
    tries = [order.substitute(position, attempt) for attempt in range(1, 100)]
    assert set(tries) | {position} == set(range(200, 300))
    assert abs(tries[0] - position) > 30
