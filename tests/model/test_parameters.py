"""The table of parameters against the state dicts of OpenCLIP's own models, on the meta device."""

import copy
from math import prod

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import known_names, load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import Normal, Parameter, Placement, local_slice
from tests import reference
from tests.ranks import whole_tensor
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
        for parameter in parameter_table(architecture):
            placement, local = parameter.placement, parameter.local_shape(size)
            axis = placement.axis
            if axis is None:
                assert local == parameter.shape
                continue
            units, rest = divmod(parameter.shape[axis], placement.blocks * placement.unit)
            assert rest == 0, parameter.name
            padding = -units % size * placement.blocks * placement.unit
            assert local[axis] * size == parameter.shape[axis] + padding, parameter.name
            assert local[:axis] + local[axis + 1 :] == (
                parameter.shape[:axis] + parameter.shape[axis + 1 :]
            )


placements = st.builds(Placement, axis=st.just(0), blocks=st.integers(1, 3), unit=st.integers(1, 5))


@given(placement=placements, units=st.integers(1, 20), size=st.integers(1, 24))
def test_segments_cover_the_axis_once_and_cut_no_unit(placement, units, size):
    """Also where the last ranks hold nothing but padding."""
    block = units * placement.unit
    covered = []
    for rank in range(size):
        segments = placement.segments(block * placement.blocks, rank, size)
        share = placement.local_length(block * placement.blocks, size) // placement.blocks
        for number, segment in enumerate(segments):
            assert segment.whole % placement.unit == segment.length % placement.unit == 0
            assert segment.local == number * share
            assert 0 <= segment.length <= share
            assert number * block <= segment.whole <= (number + 1) * block - segment.length
            covered += range(segment.whole, segment.whole + segment.length)
    assert sorted(covered) == list(range(block * placement.blocks))


@given(placement=placements, share=st.integers(1, 4), size=st.integers(1, 8))
def test_where_the_size_divides_the_units_nothing_is_padded(placement, share, size):
    length = placement.blocks * placement.unit * share * size
    assert placement.local_length(length, size) * size == length
    for rank in range(size):
        assert sum(s.length for s in placement.segments(length, rank, size)) * size == length


@given(placement=placements, units=st.integers(1, 9), size=st.integers(1, 12))
def test_slices_put_together_are_the_whole_and_the_rest_is_zero(placement, units, size):
    length = placement.blocks * placement.unit * units
    whole = torch.arange(1.0, 2 * length + 1).view(2, length)
    across = Placement(axis=1, blocks=placement.blocks, unit=placement.unit)
    found = [local_slice(whole, across, rank, size) for rank in range(size)]
    assert {part.shape for part in found} == {across.local_shape(whole.shape, size)}
    values = torch.cat(found, dim=1).flatten()
    assert sorted(values[values != 0].tolist()) == whole.flatten().tolist()
    parameter = Parameter("x", "x", tuple(whole.shape), Normal(1), True, across)
    assert torch.equal(whole_tensor(parameter, found), whole)


def test_a_replicated_tensor_has_no_segments():
    with pytest.raises(ValueError, match="no split axis"):
        Placement().segments(4, 0, 2)
