"""Our facts about timm's trunks against what timm builds, and initial values and decay against
OpenCLIP with timm."""

from dataclasses import fields

import open_clip
import pytest
import timm
import torch
from timm.layers import RotaryEmbeddingCat

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.timm_json import TIMM_VISION_KEYS
from parallel_clip.model.timm_trunks import TRUNKS
from tests.reference import build_model, decayed
from tests.small_models import KINDS, small_model, timm_model


def with_trunk(name: str, **vision) -> dict:
    """A model with a trunk as timm has it, of pictures of its own size, and a text tower of its
    width."""
    width = TRUNKS[name].size.width
    config = small_model({}, {"width": width, "proj_type": "none"}, embed_dim=width)
    given = {"timm_model_name": name, "timm_pool": TRUNKS[name].pool, "timm_proj": "none"}
    return config | {"vision_cfg": given | vision}


@pytest.mark.parametrize("name", TRUNKS)
def test_facts_are_timms(name):
    ours = architecture_from_json(with_trunk(name), name).vision
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
    block = theirs.blocks[0]
    attention = block.attn
    assert (len(theirs.blocks), theirs.embed_dim) == (ours.layers, ours.width)
    assert (attention.num_heads, block.mlp.fc1.out_features) == (ours.heads, ours.mlp_width)
    assert theirs.patch_embed.img_size == ours.image_size
    assert theirs.patch_embed.grid_size == ours.grid
    assert (theirs.pos_embed.shape[1], theirs.patch_embed.proj.kernel_size) == (
        ours.tokens,
        ours.patch_size,
    )
    assert {block.norm1.eps, block.norm2.eps, theirs.norm.eps} == {ours.norm_eps}
    assert activation_of(block.mlp.act) == ours.activation
    assert (theirs.num_prefix_tokens == 1) == ours.class_token
    assert isinstance(theirs.norm_pre, torch.nn.Identity) != ours.pre_norm
    if ours.pool is None:
        assert theirs.global_pool == "token"
    else:
        pool = theirs.attn_pool
        assert (pool.num_heads, pool.mlp.fc1.out_features) == (ours.pool.heads, ours.pool.mlp_width)
        assert activation_of(pool.mlp.act) == ours.pool.activation
        assert pool.norm.eps == ours.norm_eps
    rope = getattr(theirs, "rope", None)
    assert (rope is not None) == (ours.rotary is not None)
    if rope is not None:
        assert (rope.ref_feat_shape, rope.grid_offset) == (
            ours.rotary.reference,
            ours.rotary.offset,
        )
        assert (rope.temperature, rope.grid_indexing, rope.rotate_half) == (10_000, "xy", False)


def activation_of(module: torch.nn.Module) -> str:
    tanh = "tanh" in type(module).__name__.lower() or getattr(module, "approximate", "") == "tanh"
    assert "gelu" in type(module).__name__.lower()
    return "gelu_tanh" if tanh else "gelu"


@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (5, 3), (1, 7)])
@pytest.mark.parametrize("name", [name for name in TRUNKS if "pe_core" in name])
def test_rotary_angles_are_timms(name, grid):
    rotary = TRUNKS[name].rotary
    head_width = TRUNKS[name].size.width // TRUNKS[name].size.heads
    theirs = RotaryEmbeddingCat(
        head_width,
        in_pixels=False,
        feat_shape=grid,
        ref_feat_shape=rotary.reference,
        grid_offset=rotary.offset,
        grid_indexing="xy",
    ).get_embed()
    ours = rotary.angles(grid, head_width).repeat_interleave(2, dim=-1)
    assert torch.equal(torch.cat([ours.sin(), ours.cos()], dim=-1), theirs)


WIDE = {
    "siglip": timm_model(
        "vit_base_patch16_siglip_224",
        {"timm_pool": "map", "timm_proj": "none", "width": 256, "head_width": 64},
        {"proj_bias": True},
        embed_dim=256,
        init_logit_bias=-10,
    ),
    "pe-core": timm_model(
        "vit_pe_core_base_patch16_224",
        {"timm_pool": "map", "timm_proj": None, "width": 256, "head_width": 64, "layers": 4},
        {},
        embed_dim=192,
    ),
    "mobile-clip": timm_model(
        "vit_large_patch14_clip_224",
        {"timm_pool": "token", "timm_proj": "", "width": 256, "head_width": 64},
        {},
        embed_dim=192,
    ),
    "linear": timm_model(
        "vit_base_patch16_siglip_224",
        {"timm_pool": "map", "timm_proj_bias": True, "width": 256, "head_width": 64},
        {},
        embed_dim=192,
    ),
}


@pytest.mark.parametrize("kind", WIDE)
def test_initial_deviations_are_those_of_open_clip_with_timm(kind):
    torch.manual_seed(0)
    theirs = dict(build_model(WIDE[kind]).named_parameters())
    for parameter in parameter_table(architecture_from_json(WIDE[kind], kind)):
        ours, drawn = initial_value(parameter, seed=5), theirs[parameter.name]
        if parameter.initial.__class__.__name__ == "Constant":
            assert torch.equal(ours, drawn), parameter.name
            continue
        # Of n values a deviation is off by 1/sqrt(2n) of itself, on both sides; 5 times that.
        tolerance = 5 * (2 / (2 * ours.numel())) ** 0.5
        assert ours.std().item() == pytest.approx(drawn.std().item(), rel=tolerance), parameter.name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "timm" in kind])
def test_decay_is_open_clips(kind):
    table = parameter_table(architecture_from_json(KINDS[kind], kind))
    theirs = dict(build_model(KINDS[kind]).named_parameters())
    assert {p.name: p.decayed for p in table} == {n: decayed(n, p) for n, p in theirs.items()}


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_model_name": "vit_base_patch16_224"}, "not built here; the nearest"),
        ({"timm_model_name": "fastvit_mci2"}, "FastViT.* vit_large_patch14_clip_224"),
        ({"timm_model_name": "vit_base_mci_224"}, "convolutional.*vit_base_patch16_clip_224"),
        ({"timm_model_name": "naflexvit_so400m_patch16_siglip"}, "NaFlex.*base_patch16_siglip_256"),
        ({"timm_model_name": "eva02_base_patch16_clip_224"}, "EVA.* vit_pe_core_large"),
        ({"timm_pool": "avg"}, "timm_pool = 'avg' is not supported"),
        ({"timm_pool": None}, "timm_pool = None is not supported"),
        ({"timm_pool": "token"}, "needs a class token"),
        ({"timm_proj": "mlp"}, "timm_proj = 'mlp'"),
        ({"timm_proj": ["linear"]}, r"timm_proj = \['linear'\]"),
        ({"timm_proj": {}}, "timm_proj = {}"),
        ({"timm_pool": ["map"]}, r"timm_pool = \['map'\]"),
        ({"timm_proj": False}, "timm_proj = False"),
        (
            {"timm_model_name": "vit_base_patch16_clip_224", "timm_proj": "linear"},
            "timm cannot give vit_base_patch16_clip_224 attention pooling after it is built",
        ),
        ({"mlp_ratio": -1}, "mlp_ratio -1.0 leaves no MLP at width 48"),
        ({"mlp_ratio": 0}, "mlp_ratio 0.0 leaves no MLP"),
        ({"mlp_ratio": 1e308}, r"mlp_ratio 1e\+308 leaves no MLP"),
        (
            {
                "timm_model_name": "vit_pe_core_base_patch16_224",
                "act_kwargs": {"approximate": "none"},
            },
            "builds vit_pe_core_base_patch16_224 with exact GELU alone",
        ),
        ({"timm_proj": "linear", "timm_drop": 0.1}, "timm_drop"),
        ({"width": 50}, "width 50 cannot be cut"),
        ({"timm_model_name": "vit_pe_core_base_patch16_224", "head_width": 6}, "multiple of 4"),
        ({"timm_model_name": "vit_pe_core_base_patch16_224", "width": 60}, "8 heads of the atten"),
        ({"image_size": 7}, "no whole patch"),
        (
            {"timm_model_name": "vit_pe_core_base_patch16_224", "patch_dropout": 0.5},
            "patch_dropout 0.5 with rotary",
        ),
        ({"width": 96}, "embed_dim 48 has to be vision_cfg.width 96"),
        ({"timm_drop_path": 1.5}, "timm_drop_path 1.5"),
        ({"act_kwargs": {"approximate": "no"}}, "act_kwargs.approximate"),
        ({"timm_modelname": 1}, "unknown key vision_cfg.timm_modelname"),
    ],
)
def test_wrong_configs_are_named(vision, message):
    config = timm_model(
        "vit_base_patch16_siglip_224",
        {"timm_pool": "map", "timm_proj": "none"} | vision,
        {"proj_bias": True},
        embed_dim=48,
    )
    with pytest.raises(InputError, match=message):
        architecture_from_json(config, "wrong")


@pytest.mark.parametrize("name", TIMM_VISION_KEYS.unsupported)
def test_switches_of_openclips_own_tower_are_refused_beside_a_trunk(name):
    config = KINDS["timm-siglip"]

    def with_switch(value):
        return architecture_from_json(
            config | {"vision_cfg": config["vision_cfg"] | {name: value}}, "x"
        )

    default = next(f.default for f in fields(open_clip.CLIPVisionCfg) if f.name == name)
    assert with_switch(default) == with_switch(None) == architecture_from_json(config, "x")
    with pytest.raises(InputError, match=f"vision_cfg.{name} = 0.1 .*OpenCLIP's own tower"):
        with_switch(0.1)


def test_timm_without_a_name_is_openclips_own_tower():
    config = small_model({"timm_model_name": "", "timm_pool": "map"})
    assert architecture_from_json(config, "own") == architecture_from_json(small_model(), "own")
    assert open_clip.CLIPVisionCfg().timm_pool == "avg", "the default that is not built"
