"""The layout: every rank has its place, every pair its rank, and misfits name what would fit."""

import re
from collections.abc import Callable, Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel_clip.config import LearningRateSchedule, Train
from parallel_clip.errors import InputError
from parallel_clip.layout import (
    Coordinates,
    Layout,
    check_microbatches,
    check_model,
    divisors,
    plan_batch,
    training_steps,
)
from parallel_clip.model.known_models import load_architecture

sizes = st.integers(1, 6)


def accepted(candidates: Iterable[int], check: Callable[[int], object]) -> list[int]:
    """The candidates for which `check` raises no InputError."""
    found = []
    for candidate in candidates:
        try:
            check(candidate)
        except InputError:
            continue
        found.append(candidate)
    return found


@given(sizes, sizes, sizes)
def test_every_rank_has_its_own_place(data, tensor, pipeline):
    layout = Layout(data * tensor * pipeline, tensor, pipeline)
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    assert layout.data == data
    assert sorted(places) == [
        (d, t, p) for d in range(data) for t in range(tensor) for p in range(pipeline)
    ]


@given(sizes, sizes, sizes)
def test_the_places_are_those_of_megatron_core(data, tensor, pipeline):
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(data * tensor * pipeline, tensor, pipeline)
    ranks = RankGenerator(
        tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp", rank_offset=0
    )
    for name, along in (("tp", "tensor"), ("dp", "data"), ("pp", "pipeline")):
        for group in ranks.get_ranks(name):
            places = [layout.coordinates(rank)._asdict() for rank in group]
            assert [place.pop(along) for place in places] == list(range(len(group)))
            assert all(place == places[0] for place in places)


def test_tensor_ranks_are_neighbours():
    layout = Layout(world=8, tensor=2, pipeline=2)
    assert layout.coordinates(1) == Coordinates(data=0, tensor=1, pipeline=0)
    assert layout.coordinates(2) == Coordinates(data=1, tensor=0, pipeline=0)
    assert layout.coordinates(4) == Coordinates(data=0, tensor=0, pipeline=1)
    with pytest.raises(ValueError, match="rank 8 is not one of 8"):
        layout.coordinates(8)


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "remedy"),
    [
        (8, 3, 1, "start 6 or 9 processes, or set parallel.tensor to 1, 2, 4 or 8"),
        (1, 2, 1, "start 2 processes, or set parallel.tensor to 1"),
        (12, 4, 2, "start 8 or 16 processes, or set parallel.tensor to 1, 2, 3 or 6"),
        (3, 2, 2, "start 4 processes"),
    ],
)
def test_a_world_that_does_not_fit(world, tensor, pipeline, remedy):
    with pytest.raises(InputError) as caught:
        Layout(world, tensor, pipeline)
    assert str(caught.value).endswith(f"= {tensor * pipeline}; {remedy}")


@given(st.integers(1, 8), st.integers(1, 300), st.integers(1, 40))
def test_a_batch_is_dealt_whole_or_the_remedies_hold(data, global_batch, micro_batch):
    layout = Layout(data)
    try:
        plan = plan_batch(layout, global_batch, micro_batch)
    except InputError as error:
        _, remedies = str(error).split("; set batch.global to ")
        globals_, _, micros = remedies.partition(", or batch.micro to ")
        for size in re.findall(r"\d+", globals_):
            plan_batch(layout, int(size), micro_batch)
        for size in re.findall(r"\d+", micros):
            plan_batch(layout, global_batch, int(size))
        assert bool(micros) == (global_batch % data == 0)
    else:
        assert plan.microbatches * plan.micro_batch == plan.per_rank
        assert plan.per_rank * data == plan.global_batch == global_batch


def test_a_batch_that_does_not_divide():
    with pytest.raises(InputError) as caught:
        plan_batch(Layout(32, tensor=2), global_batch=4096, micro_batch=24)
    assert str(caught.value) == (
        "batch.global 4096 is not divisible by batch.micro 24 × data-parallel 16 = 384; "
        "set batch.global to 3840 or 4224, or batch.micro to 16 or 32"
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ViT-B-32", [1, 2, 4]), ("ViT-H-14", [1, 2, 4, 8, 16]), ("ViT-bigG-14", [1, 2, 4])],
)
def test_tensor_sizes_that_fit_a_model(name, sizes):
    costs = load_architecture(name).costs
    assert accepted(range(1, 17), lambda tensor: check_model(tensor, costs)) == sizes


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "ViT-B-32",
            8,
            "parallel.tensor 8 does not divide the 12 heads of the vision tower of ViT-B-32; "
            "parallel.tensor may be 1, 2 or 4, or any size with parallel.pad=true (vision 12 heads "
            "to 16: 6.2% of all FLOPs are on zeros)",
        ),
        (
            "ViT-bigG-14",
            3,
            "parallel.tensor 3 does not divide the 16 heads and 8192 MLP channels of the vision "
            "tower, nor the 20 heads and 5120 MLP channels of the text tower of ViT-bigG-14; "
            "parallel.tensor may be 1, 2 or 4, or any size with parallel.pad=true (vision 16 heads "
            "to 18, 8192 MLP channels to 8193; text 20 heads to 21, 5120 MLP channels to 5121: "
            "3.5% of all FLOPs are on zeros)",
        ),
    ],
)
def test_a_tensor_size_that_does_not_divide_the_model(name, tensor, message):
    costs = load_architecture(name).costs
    with pytest.raises(InputError) as caught:
        check_model(tensor, costs)
    assert str(caught.value) == message
    check_model(tensor, costs, pad=True)


def test_virtual_stages_need_a_pipeline():
    with pytest.raises(InputError) as caught:
        Layout(2, virtual_pipeline=2)
    assert str(caught.value) == (
        "parallel.virtual_pipeline 2 needs parallel.pipeline of at least 2; set one or the other"
    )


@pytest.mark.parametrize(
    ("global_batch", "micro", "remedy"),
    [
        (24, 4, "set batch.micro to 3 or less, or batch.global to 32 or more"),
        (6, 3, "set batch.global to 24 or more"),
    ],
)
def test_virtual_stages_need_a_microbatch_for_each_rank(global_batch, micro, remedy):
    layout = Layout(8, pipeline=4, virtual_pipeline=2)
    plan = plan_batch(layout, global_batch, micro)
    with pytest.raises(InputError) as caught:
        check_microbatches(layout, plan)
    assert str(caught.value) == (
        "parallel.virtual_pipeline 2 needs at least as many microbatches as parallel.pipeline 4; "
        f"there are {plan.microbatches} of batch.micro {micro}; {remedy}, or "
        "parallel.virtual_pipeline to 1"
    )


def test_a_pipeline_takes_any_number_of_microbatches_without_virtual_stages():
    def counts(layout: Layout) -> list[int]:
        return accepted(range(1, 7), lambda m: check_microbatches(layout, plan_batch(layout, m, 1)))

    assert counts(Layout(4, pipeline=4)) == [1, 2, 3, 4, 5, 6]
    assert counts(Layout(4, pipeline=4, virtual_pipeline=3)) == [4, 5, 6]


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"steps": 7}, 7),
        ({"samples": 65}, 6),
        ({"epochs": 2.0}, 6),
        ({"epochs": 2.5}, 7),
        ({"epochs": 0.7}, 2),
    ],
)
def test_only_whole_batches_count(train, steps):
    assert training_steps(Train(**train), 30, 10, LearningRateSchedule()) == steps


def test_the_decimals_of_epochs_are_taken_as_written():
    assert int(0.29 * 100) == 28
    assert training_steps(Train(epochs=0.29), 100, 1, LearningRateSchedule()) == 29


@pytest.mark.parametrize(
    ("train", "remedy"),
    [
        ({"samples": 9}, "set train.samples to at least 10, or batch.global to at most 9"),
        ({"epochs": 2.0}, "set train.epochs to at least 3.334, or batch.global to at most 6"),
    ],
)
def test_a_run_shorter_than_one_step(train, remedy):
    with pytest.raises(InputError) as caught:
        training_steps(Train(**train), 3, 10, LearningRateSchedule())
    assert str(caught.value).endswith(remedy)


@given(st.integers(1, 500))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(sizes, sizes, st.integers(1, 40))
def test_a_world_fits_or_its_remedies_do(tensor, pipeline, world):
    assume(world % (tensor * pipeline))
    with pytest.raises(InputError) as caught:
        Layout(world, tensor, pipeline)
    worlds, _, tensors = str(caught.value).split("; start ")[1].partition(" processes")
    for size in re.findall(r"\d+", worlds):
        Layout(int(size), tensor, pipeline)
    for size in re.findall(r"\d+", tensors):
        Layout(world, int(size), pipeline)
