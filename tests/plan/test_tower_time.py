"""Seconds of a tower's parts: on a device that only multiplies they are the FLOPs of its costs; on
one that only communicates, the volumes of Megatron's tensor parallelism."""

from dataclasses import replace

import pytest

from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.collective_time import Route
from parallel_clip.plan.kernel_time import Kernels
from parallel_clip.plan.tower_time import How, tower_time
from parallel_clip.stages.costs import FrozenLayers
from parallel_clip.stages.stage import LayerRange
from tests.plan.ideal_device import AT_ONCE, NO_TIME, PEAK, ideal_device

PAIRS = 3
FAST = Route(AT_ONCE, NO_TIME)
MODELS = ["ViT-B-32", "ViT-L-14", "ViT-bigG-14", "ViT-SO400M-14-SigLIP"]


def how(tensor=1, sequence=False, recompute="none", route=FAST, **changes) -> How:
    return How(Kernels(ideal_device(**changes), "bf16"), PAIRS, tensor, sequence, recompute, route)


def towers(model: str):
    architecture = load_architecture(model)
    yield architecture.vision, architecture.costs.vision
    yield architecture.text, architecture.costs.text


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_products_are_the_flops_of_the_costs(model, tensor):
    for tower, costs in towers(model):
        time, held = (
            tower_time(tower, costs, how(tensor)),
            LayerRange(0, tower.layers, tower.layers),
        )
        on_ranks = costs.on_tensor_ranks(tensor)
        seconds = PAIRS / tensor / PEAK
        assert time.forward(held).compute == pytest.approx(seconds * on_ranks.of(held))
        # The pictures themselves have no gradient.
        backward = on_ranks.backward(held) - on_ranks.embedding
        assert time.backward(held, costs).compute == pytest.approx(seconds * backward)
        assert time.forward(held).tensor + time.backward(held, costs).tensor < 1e-20


def test_a_stage_has_its_layers_embedding_and_head():
    tower, costs = next(towers("ViT-B-32"))
    time = tower_time(tower, costs, how())
    first, middle, last = (LayerRange(*bounds, 12) for bounds in [(0, 5), (5, 7), (7, 12)])
    parts = [time.forward(held).compute for held in (first, middle, last)]
    assert sum(parts) == pytest.approx(time.forward(LayerRange(0, 12, 12)).compute)
    assert parts[1] == pytest.approx(2 * PAIRS * costs.block / PEAK)
    assert time.forward(LayerRange(12, 12, 12)).total == 0


def test_recomputation():
    tower, costs = next(towers("ViT-B-32"))
    held = LayerRange(5, 7, 12)
    slow_memory = {"memory_bandwidth": 1e9}
    none, selective, full = (
        tower_time(tower, costs, how(recompute=kind, **slow_memory)).backward(held, costs).compute
        for kind in ("none", "selective", "full")
    )
    forward = tower_time(tower, costs, how(**slow_memory)).forward(held).compute
    assert full == pytest.approx(none + forward)
    # Two norms and the activation of 50 tokens of width 768 and 3072, read and written in bf16.
    again = 2 * 50 * PAIRS * 2 * (2 * 2 * 768 + 2 * 3072) / 1e9
    assert selective == pytest.approx(none + again)


def test_what_is_frozen_is_spared():
    tower, costs = next(towers("ViT-B-32"))
    whole = replace(costs, frozen=FrozenLayers(True, 12, 12, True))
    part = replace(costs, frozen=FrozenLayers(True, 4, 8))
    time, held = tower_time(tower, costs, how()), LayerRange(0, 12, 12)
    assert time.backward(held, whole).total == 0
    # Attention has no matrix of its own: all its gradients are of inputs, as in any layer.
    attention = 4 * 50**2 * 768
    flops = part.backward(held) + (8 - 4) * attention
    assert time.backward(held, part).compute == pytest.approx(PAIRS * flops / PEAK)


def volumes(tensor: int, sequence: bool, compute_at_once: bool) -> tuple[float, float]:
    """Bytes that a rank sends, forward and backward, while nothing is computed, of one block of
    ViT-B-32's text tower."""
    _, (tower, costs) = towers("ViT-B-32")
    peak = AT_ONCE if compute_at_once else 1.0
    arithmetic = {"peak": peak, "products": [[1.0, 1.0]], "attention": [[1, 1.0, 1.0]]}
    time = tower_time(
        tower, costs, how(tensor, sequence, route=Route(1.0, NO_TIME), bf16=arithmetic)
    )
    held = LayerRange(3, 4, 12)
    return time.forward(held).tensor, time.backward(held, costs).tensor


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_volume_of_tensor_parallelism(tensor):
    """Two all-reduces a block each way, of 2 (t - 1) / t of the hidden states (Shoeybi et al.,
    "Megatron-LM", arXiv 1909.08053, section 3); as much under sequence parallelism, and two
    gatherings of inputs backward (Korthikanti et al., arXiv 2205.05198, section 4.2.2)."""
    once = 2 * 77 * PAIRS * 512 * (tensor - 1) / tensor
    assert volumes(tensor, False, True) == pytest.approx((4 * once, 4 * once))
    padded = 2 * -(-77 // tensor) * tensor * PAIRS * 512 * (tensor - 1) / tensor
    assert volumes(tensor, True, True) == pytest.approx((4 * padded, 6 * padded))


@pytest.mark.parametrize("tensor", [2, 4])
def test_what_is_sent_behind_products_takes_no_time(tensor):
    """Backward the all-reduces; under sequence parallelism all but the gatherings of gradients."""
    once = 2 * 77 * PAIRS * 512 * (tensor - 1) / tensor
    assert volumes(tensor, False, False) == pytest.approx((4 * once, 0))
    padded = 2 * -(-77 // tensor) * tensor * PAIRS * 512 * (tensor - 1) / tensor
    assert volumes(tensor, True, False) == pytest.approx((4 * padded, 2 * padded))


def test_a_small_block_takes_as_long_as_the_host_needs_to_start_it():
    tower, costs = next(towers("ViT-B-32"))
    time = tower_time(tower, costs, how(operation_seconds=1.0))
    held = LayerRange(5, 7, 12)
    assert time.forward(held).compute == pytest.approx(2 * 12)
    assert time.backward(held, costs).compute == pytest.approx(2 * 30)
