"""Layer groups against what OpenCLIP's `lock` leaves unlocked, and timm's own layer decay."""

import functools

import pytest
import torch
from timm.optim import param_groups_layer_decay

from parallel_clip.model.layer_groups import layer_groups
from parallel_clip.model.openclip_json import architecture_from_json
from tests.reference import build_model
from tests.small_models import KINDS, timm_model

MODELS = {kind: KINDS[kind] for kind in KINDS if kind.startswith("timm")} | {
    "clip": KINDS["layer-scale"],
    "no-pre-norm": KINDS["no-pre-norm"],
    "custom-text": KINDS["siglip"],
    "timm-token-linear": timm_model(
        "vit_large_patch14_clip_224", {"timm_pool": "token", "timm_proj": "linear"}, {}
    ),
}


@functools.cache
def meta_model(kind: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(MODELS[kind])


def unlocked_in_open_clip(kind: str, tower: str, groups: int) -> set[str]:
    model = meta_model(kind).requires_grad_(True)
    if tower == "vision":
        model.lock_image_tower(unlocked_groups=groups)
    else:
        model.lock_text_tower(unlocked_layers=groups)
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_last_groups_are_what_open_clip_unlocks(kind, tower):
    groups = getattr(layer_groups(architecture_from_json(MODELS[kind], kind)), tower)
    everything = {name for name, _ in meta_model(kind).named_parameters()}
    others = everything - groups.number.keys()
    assert all(name.startswith("visual.") == (tower == "vision") for name in groups.number)
    for unlocked in range(groups.lockable + 2):
        frozen = groups.lockable - unlocked
        ours = {name for name, number in groups.number.items() if number >= frozen}
        assert ours | others == unlocked_in_open_clip(kind, tower, unlocked), unlocked


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.startswith("timm")])
def test_scales_by_group_are_timms(kind):
    groups = layer_groups(architecture_from_json(MODELS[kind], kind)).vision
    trunk = meta_model(kind).requires_grad_(True).visual.trunk
    names = {id(p): name for name, p in trunk.named_parameters()}
    for group in param_groups_layer_decay(trunk, layer_decay=0.5):
        for p in group["params"]:
            number = groups.number[f"visual.trunk.{names[id(p)]}"]
            assert 0.5 ** (groups.lockable - 1 - number) == group["lr_scale"]


def test_a_linear_layer_behind_a_trunk_is_a_group_beyond_those_that_lock_counts():
    groups = layer_groups(architecture_from_json(MODELS["timm-linear"], "")).vision
    assert (groups.count, groups.lockable) == (5, 4)  # embedding, 2 blocks, pool; projection
    assert groups.number["visual.head.proj.weight"] == 4
    without = layer_groups(architecture_from_json(MODELS["timm-token-linear"], "")).vision
    assert (without.count, without.lockable) == (4, 3)
