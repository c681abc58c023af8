"""What `freeze` keeps from training, against OpenCLIP's own locking."""

import pytest

from parallel_clip.config import Freeze, PartlyFrozen
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.build import frozen_parts
from parallel_clip.stages.costs import FrozenLayers
from parallel_clip.stages.stage import LayerRange
from tests.model.test_layer_groups import MODELS, meta_model
from tests.reference import lock_towers


def frozen(kind: str, **freeze):
    sections = {
        tower: how if how in ("all", None) else PartlyFrozen(**how) for tower, how in freeze.items()
    }
    return frozen_parts(architecture_from_json(MODELS[kind], kind), Freeze(**sections))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_names_are_those_that_open_clip_locks(kind, norms):
    for groups in range(5):
        how = {"unlocked_groups": groups, "norms": norms}
        try:
            ours = frozen(kind, vision=how, text=how).names
        except InputError:
            assert groups >= 4  # of two blocks, some without a projection
            continue
        model = meta_model(kind).requires_grad_(True)
        lock_towers(model, {"vision": how, "text": how})
        assert ours == {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
def test_all_is_all_of_a_tower(kind):
    names = {name for name, _ in meta_model(kind).named_parameters()}
    logits = {"logit_scale", "logit_bias"}
    assert frozen(kind, vision="all", text="all").names == names - logits
    vision = {name for name in names if name.startswith("visual.")}
    assert frozen(kind, vision="all").names == vision
    assert frozen(kind).names == set()


def test_how_far_backward_gets():
    """Of two blocks."""
    layers = {
        groups: frozen("clip", vision={"unlocked_groups": groups}).vision.layers
        for groups in range(5)
    }
    assert layers == {
        0: FrozenLayers(True, 2, 2, whole=True),
        1: FrozenLayers(True, 2, 2),
        2: FrozenLayers(True, 1, 1),
        3: FrozenLayers(True, 0, 0),
        4: FrozenLayers(False, 0, 0),
    }
    norms = frozen("clip", vision={"unlocked_groups": 2, "norms": True}).vision.layers
    assert norms == FrozenLayers(True, 0, 1)


def test_what_a_stage_has_to_hand_back():
    tower = frozen("clip", vision={"unlocked_groups": 2}).vision  # block 1 and the projection
    assert not tower.wants_gradient_before(LayerRange(0, 1, 2))
    assert not tower.wants_gradient_before(LayerRange(1, 2, 2))
    assert tower.wants_gradient_before(LayerRange(2, 2, 2)), "features"
    assert [tower.leading_layers(LayerRange(*held, 2)) for held in ((0, 2), (1, 2))] == [1, 0]
    whole = frozen("clip", vision="all").vision
    assert not whole.wants_gradient_before(LayerRange(2, 2, 2))
    assert frozen("clip").vision.wants_gradient_before(LayerRange(1, 2, 2))


def test_more_groups_than_there_are():
    with pytest.raises(InputError, match="unlocked_groups 6 is more than the 4 groups"):
        frozen("clip", vision={"unlocked_groups": 6})
