"""The predicted time of a step against closed forms, the pipeline's timeline and the real model."""

import math
from typing import Any

import pytest

from parallel_clip.config import Config, config_from_dict
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.handover import MessageLayout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.pipeline.orders import step_orders
from parallel_clip.pipeline.timeline import Costs, simulate
from parallel_clip.plan.device_file import Device, device_names, read_device
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.pipeline_time import pipeline_seconds
from parallel_clip.plan.step_time import (
    StepTime,
    message_numbers,
    predict_step,
    trained_parameters,
)
from parallel_clip.stages.partition import partition
from tests.plan.ideal_device import PEAK, ideal_device, link

PAIRS = 4  # in a microbatch


def config_of(model: str, global_batch: int, precision="bf16", **settings: Any) -> Config:
    return config_from_dict(
        {
            "model": {"name": model},
            "batch": {"global": global_batch, "micro": PAIRS},
            "precision": precision,
            "train": {"steps": 1},
            "schedule": {"warmup": 0},
            "data": {"train": [{"shards": "a.tar"}]},
            **settings,
        }
    )


def predicted(
    device: Device, world: int = 1, microbatches: int = 4, model: str = "ViT-B-32", **settings: Any
) -> StepTime:
    """Of so many microbatches on each data rank; settings: of the config's section `parallel`, but
    for those named otherwise."""
    others = {key: settings.pop(key) for key in ("recompute", "loss") if key in settings}
    copy = settings.get("tensor", 1) * settings.get("pipeline", 1)
    config = config_of(model, PAIRS * microbatches * world // copy, parallel=settings, **others)
    architecture = load_architecture(model)
    plan = make_layout_plan(architecture.costs, world, config)
    return predict_step(plan, architecture, config, device, nodes_of=8)


def model_seconds(architecture: Architecture, pairs: int) -> tuple[float, float]:
    """Forward and backward at the ideal device's peak; pictures have no gradient."""
    costs = architecture.costs
    forward = pairs * costs.total / PEAK
    return forward, 2 * forward - pairs * costs.vision.embedding / PEAK


def test_one_rank_that_only_multiplies():
    architecture = load_architecture("ViT-B-32")
    stash, two_pass = (
        predicted(ideal_device(), schedule=schedule) for schedule in ("stash", "two-pass")
    )
    forward, backward = model_seconds(architecture, 16)
    loss = 3 * 2 * 16 * 16 * 512 / PEAK  # logits, and the gradients of pictures and texts
    assert stash.loss == pytest.approx(loss)
    assert stash.seconds == pytest.approx(forward + backward + loss)
    assert two_pass.seconds == pytest.approx(2 * forward + backward + loss)
    assert stash.compute == pytest.approx(forward + backward)
    assert stash.samples_per_second == pytest.approx(16 / stash.seconds)
    assert stash.mfu == pytest.approx(3 * forward / stash.seconds)
    assert stash.bubble == pytest.approx(0, abs=1e-9)


def test_one_rank_does_not_communicate():
    slow = ideal_device(inside=link(1.0), between=link(1.0))
    assert predicted(slow).communication == {"tensor": 0, "pipeline": 0, "data": 0, "loss": 0}


@pytest.mark.parametrize("name", device_names())
def test_parts_add_up_without_a_pipeline(name):
    found = predicted(read_device(name), 16, 8, tensor=2, schedule="two-pass")
    kinds = found.communication
    parts = found.compute + found.loss + found.optimizer + sum(kinds.values())
    assert found.seconds == pytest.approx(parts)
    assert kinds["pipeline"] == 0
    assert min(kinds["tensor"], kinds["data"], kinds["loss"], found.optimizer, found.loss) > 0
    assert 0 < found.mfu < 1


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stash"), [(2, 1, 0), (4, 1, 3), (3, 2, 6), (4, 2, 0)]
)
def test_the_bubble_is_that_of_the_timeline(pipeline, virtual, stash):
    device, microbatches = ideal_device(fp32={**IDEAL_LOSS}), 6
    found = predicted(
        device, pipeline, microbatches, pipeline=pipeline, virtual_pipeline=virtual, stash=stash
    )
    architecture = load_architecture("ViT-B-32")
    costs, stages = architecture.costs, partition(architecture.costs, pipeline, virtual)
    forward, backward = [], []
    for stage in stages:
        of_stage = costs.vision.of(stage.vision) + costs.text.of(stage.text)
        embedding = stage.vision.has_embedding * costs.vision.embedding
        forward.append(PAIRS * of_stage / PEAK)
        backward.append(PAIRS * (2 * of_stage - embedding) / PEAK)
    orders = step_orders(pipeline, microbatches, stash, virtual)
    timeline = simulate(orders, Costs(forward, backward))
    assert found.seconds == pytest.approx(timeline.total)
    assert found.bubble == pytest.approx(timeline.bubble)
    assert found.bubble > 0.05


IDEAL_LOSS = {"peak": 1e30, "products": [[1.0, 1.0]], "attention": [[1, 1.0, 1.0]]}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2])
def test_long_steps_are_short_ones_and_their_rhythm(ranks, chunks):
    """Against the timeline of every op. Stages differ by up to a quarter. With virtual stages of
    such costs the rhythm is not all even."""
    within = 2e-3 if chunks == 1 else 1e-2
    for number, (groups, stash) in enumerate([(7, 0), (12, 12), (9, 4), (5, 1)]):
        microbatches, stash = groups * ranks, stash * ranks
        forward = [1 + ((7 * q + number) % 5) / 15 for q in range(ranks * chunks)]
        costs = Costs(forward, [2 * f for f in forward], 0.1, forward_again=forward)
        found = pipeline_seconds(ranks, chunks, microbatches, stash, costs, loss=0.7)
        orders = step_orders(ranks, microbatches, stash, chunks)
        assert found == pytest.approx(simulate(orders, costs, 0.7).total, rel=within)
    odd = pipeline_seconds(ranks, chunks, 5 * ranks + 1, 3, costs, loss=0.7)
    orders = step_orders(ranks, 5 * ranks + 1, 3, chunks)
    assert odd == pytest.approx(simulate(orders, costs, 0.7).total, rel=within)


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_and_weights_travel_once(distributed):
    """Of all parameters: fp32 gradients are summed and bf16 weights gathered, or whole sums. One
    bucket of four is too late to hide behind backward, which on this device is over at once."""
    device = ideal_device(inside=link(1.0), bf16=IDEAL_LOSS)
    found = predicted(device, 4, model="ViT-B-32", distributed_optimizer=distributed)
    count = sum(math.prod(p.shape) for p in parameter_table(load_architecture("ViT-B-32"))) - 1
    volume = (3 / 4) * count * (4 + 2) if distributed else 2 * (3 / 4) * count * 4
    assert found.communication["data"] == pytest.approx(volume)


def test_the_loss_exchanges_texts_and_their_gradients():
    device = ideal_device(inside=link(1.0), bf16=IDEAL_LOSS)
    found = predicted(device, 4, microbatches=8, loss={"exchange": "gather"})
    texts, sums = 4 * 128 * 512, 4 * 128  # fp32 of four ranks; maxima and sums of each column
    assert found.communication["loss"] == pytest.approx((3 / 4) * (2 * texts + 2 * 2 * sums))


@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-bigG-14", "ViT-SO400M-14-SigLIP"])
def test_stages_train_the_parameters_of_the_table(model, tensor):
    architecture = load_architecture(model)
    stages = partition(architecture.costs, 3)
    found = sum(trained_parameters(s, architecture, architecture.costs, tensor) for s in stages)
    table = [p for p in parameter_table(architecture) if not p.name.startswith("logit")]
    assert found == sum(math.prod(p.local_shape(tensor)) for p in table)


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("sequence_ranks", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_messages_are_those_of_the_model(stages, sequence_ranks, captions):
    architecture = load_architecture("ViT-L-14")
    parts = partition(architecture.costs, stages)
    real = MessageLayout(architecture, parts, sequence_ranks, captions).length(PAIRS, training=True)
    assert max(1, message_numbers(parts, architecture, PAIRS, sequence_ranks, captions)) == real


def test_messages_take_their_time():
    """A pipeline of two of one microbatch: two messages, of hidden states and of their gradient."""
    architecture = load_architecture("ViT-B-32")
    size = 2 * message_numbers(partition(architecture.costs, 2), architecture, PAIRS, 1)
    device = ideal_device(inside=link(1e6), memory_bandwidth=1e30)
    found = predicted(device, 2, 1, pipeline=2, schedule="stash", loss={"stages": "last"})
    without = predicted(ideal_device(), 2, 1, pipeline=2, schedule="stash", loss={"stages": "last"})
    assert found.communication["pipeline"] == pytest.approx(2 * size / 1e6)
    assert found.seconds - without.seconds == pytest.approx(2 * size / 1e6)


LAYOUTS = [
    {},
    {"tensor": 4, "sequence": True},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 4, "virtual_pipeline": 2},
    {"pipeline": 8, "schedule": "stash"},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("path", "better"),
    [
        ("inside.bandwidth", 2.0), ("between.bandwidth", 2.0), ("inside.latency", 0.5),
        ("memory_bandwidth", 2.0), ("streamed", 1.1), ("activated", 1.1), ("bf16.peak", 2.0),
        ("fp32.peak", 2.0), ("operation_seconds", 0.1), ("overhead", 0.7),
    ],
)  # fmt: skip
def test_a_better_device_is_never_slower(layout, path, better):
    tree = read_device("a100").model_dump()
    section, _, key = path.rpartition(".")
    below = tree[section] if section else tree
    before = predicted(Device.model_validate(tree), 16, 8, **layout)
    below[key] *= better
    assert predicted(Device.model_validate(tree), 16, 8, **layout).seconds <= before.seconds


def test_products_nearer_to_the_peak_are_never_slower():
    tree, seconds = read_device("h100").model_dump() | {"operation_seconds": 1e-9}, []
    points = tree["bf16"]["products"]
    for share in (0.25, 0.5, 1.0):
        tree["bf16"]["products"] = [(size, share * part) for size, part in points]
        device = Device.model_validate(tree)
        seconds.append(predicted(device, 8, model="ViT-L-14").seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5 * seconds[-1]


def test_more_recomputation_takes_longer():
    device = read_device("a100")
    seconds = [
        predicted(device, 8, recompute=kind).seconds for kind in ("none", "selective", "full")
    ]
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.15 * seconds[0]
