"""What a machine is said to read, against a cache of pages that is filled in the order itself."""

import importlib
from functools import partial
from pathlib import Path

import pytest

from parallel_clip.data.order.reading import machine_reading
from parallel_clip.data.order.sample_order import Order, OrderSource

SAMPLE, PAGE, SHARD = 50_000, 2**20, 1000


@pytest.fixture
def fetched_of_own(monkeypatch):
    """Bytes fetched beside bytes read, of the benchmark's simulation."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    simulation = importlib.import_module("page_simulation")
    assert simulation.SAMPLE_BYTES == SAMPLE
    return partial(simulation.fetched_of_read, shard=SHARD, page=PAGE)


@pytest.mark.parametrize(
    "batch, machines", [(32_768, 128), (79_104, 24), (50_000, 100), (100_001, 96)]
)
def test_a_machine_reads_little_more_than_its_part(fetched_of_own, batch, machines):
    order = Order([OrderSource([SHARD] * 2000)], 1, batch)
    told = machine_reading(order.samples_per_epoch, order.streams, SAMPLE, machines, PAGE)
    ratio = fetched_of_own(order, machines, 2, cache=int(2 * told.in_use))
    assert ratio < (1.3 if 1536 % machines else 1.25)  # 1.25 of all, and of 5 million samples
    assert 0.9 * ratio < told.fetched / told.own < 1.15 * ratio
    assert told.own == pytest.approx(2_000_000 * SAMPLE / machines)


def test_a_cache_below_what_is_in_use_fetches_again_and_again(fetched_of_own):
    order = Order([OrderSource([SHARD] * 2000)], 1, 32_768)
    told = machine_reading(order.samples_per_epoch, order.streams, SAMPLE, 64, PAGE)
    assert fetched_of_own(order, 64, 2, cache=int(0.3 * told.in_use)) > 4


def test_files_that_are_read_in_place_are_read_once():
    told = machine_reading(10**6, 1536, SAMPLE, 16, 1)
    assert told.fetched == pytest.approx(told.own, rel=1e-6)
