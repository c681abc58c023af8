"""Seconds of single operations and collectives against arithmetic by hand."""

import pytest

from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.plan.collective_time import NO_ROUTE, Route, Routes
from parallel_clip.plan.kernel_time import Kernels, interpolate
from tests.plan.ideal_device import FULL_RATE, PEAK, ideal_device, link


def test_parts_are_interpolated_in_the_logarithm_of_the_size():
    points = [(1e6, 0.2), (1e8, 0.6)]
    assert interpolate(points, 1e6, 1) == 0.2
    assert interpolate(points, 1e7, 1) == pytest.approx(0.4)
    assert interpolate(points, 1e8, 1) == interpolate(points, 1e12, 1) == 0.6
    assert interpolate(points, 5e5, 1) == pytest.approx(0.1), "half the work takes as long"


def test_a_product_is_arithmetic_or_memory():
    half = FULL_RATE | {"products": [[1.0, 0.5]]}
    kernels = Kernels(ideal_device(bf16=half), "bf16")
    assert kernels.product(100, 200, 300) == pytest.approx(2 * 100 * 200 * 300 / (PEAK / 2))
    kernels = Kernels(ideal_device(memory_bandwidth=1e6, streamed=0.5), "bf16")
    numbers = 100 * 300 + 300 * 200 + 100 * 200
    assert kernels.product(100, 200, 300) == pytest.approx(2 * numbers / 1e6)
    assert kernels.streaming(10) == pytest.approx(2 * 10 / 5e5)
    assert Kernels(ideal_device(memory_bandwidth=1e6), "fp32").streaming(10) == 4 * 10 / 1e6


def test_attention_has_parts_of_its_own():
    slow = FULL_RATE | {"attention": [[100, 0.5, 0.25]]}
    kernels = Kernels(ideal_device(fp32=slow), "fp32")
    flops = 4 * 3 * 100**2 * 64
    assert kernels.attention(3, 100, 64) == pytest.approx(flops / (PEAK / 2))
    assert kernels.attention(3, 100, 64, backward=True) == pytest.approx(2 * flops / (PEAK / 4))


def test_collectives_on_a_ring():
    route = Route(bandwidth=100.0, latency=0.5)
    assert route.all_gather(800, 4) == pytest.approx(800 * 3 / 4 / 100 + 2 * 0.5)
    assert route.all_reduce(800, 4) == 2 * route.all_gather(800, 4)
    assert route.message(800) == 8.5
    assert route.broadcast(800, 4) == 8 + 1
    alone = route.all_gather(800, 1), route.all_reduce(800, 1), route.broadcast(800, 1)
    assert alone == (0, 0, 0)
    assert route.message(0) == 0


def routes(world: int, tensor: int = 1, pipeline: int = 1, nodes_of: int = 8) -> Routes:
    device = ideal_device(inside=link(300, 1.0), between=link(50, 2.0))
    return Routes(device, Layout(world, tensor, pipeline), nodes_of)


def test_groups_within_a_node_use_its_links():
    assert routes(8, 2, 2).tensor == routes(64, tensor=8).tensor == Route(300, 1.0)
    assert routes(8).tensor == NO_ROUTE
    assert routes(8).data == routes(8).world == Route(300, 1.0)


def test_groups_that_span_nodes_use_the_links_of_their_members_there():
    assert routes(64).data == Route(300, 2.0), "eight members a node, 400 out of it, 300 within"
    assert routes(64, tensor=2).data == Route(200, 2.0), "four members a node"
    assert routes(64, tensor=8).data == Route(50, 2.0), "one member a node"
    assert routes(64, pipeline=8).pipeline == Route(50, 2.0)
    assert routes(66, tensor=3, nodes_of=8).tensor == Route(300, 2.0), "some groups lie across"
    assert routes(64, tensor=2, pipeline=8).model == Route(50, 2.0)


def test_links_that_are_not_known():
    alone = ideal_device(between=None)
    assert Routes(alone, Layout(8), 8).world.bandwidth > 0
    with pytest.raises(InputError, match="16 GPUs with 8 in a node need links between nodes"):
        Routes(alone, Layout(16), 8).data  # noqa: B018
    alone = ideal_device(inside=None)
    assert Routes(alone, Layout(1), 8).world.all_reduce(100, 1) == 0
    with pytest.raises(InputError, match="need links within a node.*no section `inside`"):
        Routes(alone, Layout(2), 8).data  # noqa: B018
