"""The table of parameters against the state dicts of OpenCLIP's own models, on the meta device."""

import copy
from math import prod

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.errors import InputError
from parallel_clip.layout import check_model
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import known_names, load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import Placement
from tests import reference
from tests.small_models import KINDS


def openclip_shapes(model_cfg: dict) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = reference.build_model(copy.deepcopy(model_cfg))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", known_names())
def test_known_models_have_openclips_names_and_shapes(name):
    architecture = load_architecture(name)
    ours = {p.name: p.shape for p in parameter_table(architecture)}
    theirs = openclip_shapes(open_clip.get_model_config(name))
    assert ours == theirs
    assert sum(map(prod, ours.values())) == sum(map(prod, theirs.values()))
    assert len({p.module for p in parameter_table(architecture)}) == len(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_every_switch_has_openclips_names_and_shapes(kind):
    table = parameter_table(architecture_from_json(KINDS[kind], kind))
    assert {p.name: p.shape for p in table} == openclip_shapes(KINDS[kind])


@pytest.mark.parametrize("name", known_names())
def test_local_shapes_add_up(name):
    architecture = load_architecture(name)
    for size in (1, 2, 3, 4, 5, 8, 10, 16, 20):
        try:
            check_model(size, architecture.costs)
        except InputError:
            continue
        for parameter in parameter_table(architecture):
            axis, local = parameter.placement.axis, parameter.local_shape(size)
            if axis is None:
                assert local == parameter.shape
                continue
            padding = -parameter.shape[axis] % size if parameter.placement.padded else 0
            expected = list(parameter.shape)
            expected[axis] += padding
            assert local[axis] * size == expected[axis], parameter.name
            assert local[:axis] + local[axis + 1 :] == (
                parameter.shape[:axis] + parameter.shape[axis + 1 :]
            )


@given(share=st.integers(1, 9), blocks=st.sampled_from([1, 3]), size=st.integers(1, 8))
def test_segments_of_equal_shares_cover_the_axis_once(share, blocks, size):
    placement = Placement(axis=0, blocks=blocks)
    check_cover(placement, share * blocks * size, size)


@given(length=st.integers(1, 50), size=st.integers(1, 60))
def test_segments_of_a_padded_axis_cover_it_once(length, size):
    """Also where the last ranks hold nothing but padding."""
    check_cover(Placement(axis=0, padded=True), length, size)


def check_cover(placement: Placement, length: int, size: int) -> None:
    covered = []
    for rank in range(size):
        used = []
        for segment in placement.segments(length, rank, size):
            covered += range(segment.whole, segment.whole + segment.length)
            used += range(segment.local, segment.local + segment.length)
        assert sorted(used) == list(range(len(used)))
        assert len(used) <= placement.local_length(length, size)
    assert sorted(covered) == list(range(length))


def test_a_replicated_tensor_has_no_segments():
    with pytest.raises(ValueError, match="no split axis"):
        Placement().segments(4, 0, 2)
