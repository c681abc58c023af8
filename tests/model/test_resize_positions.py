"""Interpolated positions against OpenCLIP's and timm's own functions, bit for bit."""

from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.resize_model import with_sizes
from parallel_clip.model.resize_positions import PositionGrid, position_grids, resize_positions
from tests.small_models import KINDS, small_model, timm_model

GRIDS = [
    ((4, 4), (7, 7)),
    ((16, 16), (24, 24)),
    ((7, 7), (3, 3)),
    ((5, 5), (3, 8)),
    ((14, 14), (1, 9)),
    ((1, 1), (4, 2)),
    ((6, 6), (6, 7)),
]
OBLONG = [((3, 8), (5, 5)), ((2, 6), (4, 3)), ((4, 3), (3, 4)), ((9, 1), (9, 2))]


def positions(length: int, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_a_grid_behind_a_class_token_as_open_clip(old, new):
    before = positions(1 + old[0] * old[1])
    ours = resize_positions(before, PositionGrid(old, 1), PositionGrid(new, 1))
    theirs = {"visual.positional_embedding": before}
    model = SimpleNamespace(visual=SimpleNamespace(grid_size=new))
    open_clip.model.resize_pos_embed(theirs, model)
    assert torch.equal(ours, theirs["visual.positional_embedding"])


@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize(("old", "new"), [*GRIDS, *OBLONG])
def test_any_grid_as_timm(old, new, class_token):
    before = positions(class_token + old[0] * old[1])
    ours = resize_positions(before, PositionGrid(old, class_token), PositionGrid(new, class_token))
    theirs = resample_abs_pos_embed(before[None], new, old, num_prefix_tokens=class_token)
    assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize(("old", "new"), [(77, 64), (13, 77), (77, 1), (32, 33), (5, 9)])
@pytest.mark.parametrize("custom_text", [False, True])
def test_a_text_as_open_clip(old, new, custom_text):
    before = positions(old)
    ours = resize_positions(before, PositionGrid((old,)), PositionGrid((new,)))
    key = "text.positional_embedding" if custom_text else "positional_embedding"
    theirs, holder = {key: before}, SimpleNamespace(positional_embedding=torch.empty(new, 48))
    open_clip.model.resize_text_pos_embed(
        theirs, SimpleNamespace(text=holder) if custom_text else holder
    )
    assert torch.equal(ours, theirs[key])


def test_half_precision_is_interpolated_in_fp32_and_equal_grids_are_left_alone():
    before = positions(10).bfloat16()
    old, new = PositionGrid((3, 3), 1), PositionGrid((4, 4), 1)
    assert torch.equal(
        resize_positions(before, old, new), resize_positions(before.float(), old, new)
    )
    assert torch.equal(resize_positions(before, old, old), before.float())


def test_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="not those of"):
        resize_positions(positions(9), PositionGrid((3, 3), 1), PositionGrid((4, 4), 1))
    with pytest.raises(ValueError, match="no counterpart"):
        resize_positions(positions(9), PositionGrid((3, 3)), PositionGrid((4, 4), 1))
    with pytest.raises(ValueError, match="no counterpart"):
        resize_positions(positions(9), PositionGrid((3, 3)), PositionGrid((9,)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tower_has_its_grid(kind):
    architecture = architecture_from_json(KINDS[kind], kind)
    grids = position_grids(architecture)
    assert [grid.length for grid in grids.values()] == [
        architecture.vision.tokens,
        architecture.text.tokens,
    ]
    assert str(PositionGrid((3, 5), 1)) == "3 x 5" and str(PositionGrid((77,))) == "77"


# ------------------------------------------------------------------------ models of another size


def test_a_model_of_another_size_keeps_all_else():
    base = architecture_from_json(small_model({"patch_dropout": 0.5}, {"eos_id": 3}), "small")
    assert with_sizes(base) is base
    other = with_sizes(base, [40, 24], 20)
    assert other == architecture_from_json(
        small_model(
            {"patch_dropout": 0.5, "image_size": [40, 24]}, {"eos_id": 3, "context_length": 20}
        ),
        "other",
    )
    assert base.json["vision_cfg"]["image_size"] == 32, "a JSON of its own"
    assert with_sizes(base, [48, 48]).json["vision_cfg"]["image_size"] == 48


@pytest.mark.parametrize(
    ("trunk", "size", "wanted"),
    [
        ("vit_base_patch16_siglip_224", 384, "vit_base_patch16_siglip_384"),
        ("vit_base_patch16_siglip_384", 320, "vit_base_patch16_siglip_384"),
        ("vit_base_patch16_siglip_224", [224, 256], "vit_base_patch16_siglip_224"),
        # Of 512 pixels it has another activation, so that it is not the same.
        ("vit_large_patch16_siglip_256", 512, "vit_large_patch16_siglip_256"),
        ("vit_large_patch14_clip_224", 336, "vit_large_patch14_clip_336"),
        # Rotary positions refer to the grid of the name.
        ("vit_pe_core_base_patch16_224", 384, "vit_pe_core_base_patch16_224"),
    ],
)
def test_timm_knows_some_sizes_by_name(trunk, size, wanted):
    pool = "token" if "clip" in trunk else "map"
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": None, "image_size": 224}
    base = architecture_from_json(small_model({}, custom_text=True) | {"vision_cfg": vision}, "x")
    sized = with_sizes(base, size).json["vision_cfg"]
    assert (sized["timm_model_name"], sized["image_size"]) == (wanted, size)


@pytest.mark.parametrize("size", [40, 56, [24, 40]])
@pytest.mark.parametrize("trunk", ["vit_pe_core_base_patch16_224", "vit_base_patch16_siglip_224"])
def test_positions_and_rotary_angles_are_those_of_a_trunk_that_timm_sets_to_a_size(trunk, size):
    """With rotary positions, by the grid of the name (`ref_feat_shape`) and the new one."""
    small = {"embed_dim": 48, "depth": 1, "num_heads": 4, "patch_size": 8}
    theirs = timm.create_model(trunk, img_size=32, num_classes=0, **small)
    config = timm_model(trunk, {"timm_pool": "map", "timm_proj": None, "image_size": 32}, {})
    old = architecture_from_json(config, "old")
    new = with_sizes(old, size)
    name = "visual.trunk.pos_embed"
    before = theirs.pos_embed.detach()[0]
    ours = resize_positions(before, position_grids(old)[name], position_grids(new)[name])
    theirs.set_input_size(size)
    assert torch.equal(ours, theirs.pos_embed[0])
    if new.vision.rotary is not None:
        angles = new.vision.rotary.angles(new.vision.grid, 12).repeat_interleave(2, dim=-1)
        assert torch.equal(torch.cat([angles.sin(), angles.cos()], -1), theirs.rope.get_embed())
