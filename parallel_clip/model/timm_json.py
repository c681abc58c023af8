"""Reading a `vision_cfg` that names an image tower of timm."""

from __future__ import annotations

from difflib import get_close_matches

from parallel_clip.model.json_section import JsonSection, SectionKeys
from parallel_clip.model.timm_trunks import TRUNKS, Trunk, trunk_size
from parallel_clip.model.towers.attention_pool import AttentionPoolConfig
from parallel_clip.model.towers.timm_vision import TimmVisionConfig
from parallel_clip.model.towers.transformer import ImageTowerConfig

# These change the trunk; OpenCLIP, which does not look at them, always builds the one that is
# named.
TRUNK_KEYS = tuple("width layers head_width mlp_ratio patch_size act_kwargs norm_kwargs".split())
TIMM_VISION_KEYS = SectionKeys(
    read=frozenset(
        "timm_model_name timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path image_size "
        "patch_dropout".split()
    )
    | set(TRUNK_KEYS),
    # Beside keys that do change the trunk they would look as if they did.
    unsupported=dict.fromkeys(
        "ls_init_value no_ln_pre final_ln_after_pool pool_type pos_embed_type attentional_pool "
        "output_tokens block_type qk_norm scaled_cosine_attn scale_heads scale_attn_inner "
        "scale_attn scale_fc".split(),
        "a switch of OpenCLIP's own tower, which is not read beside timm_model_name: leave it out",
    ),
    # OpenCLIP sets the first itself, and reads the others beside attentional_pool.
    without_effect=frozenset({"timm_model_pretrained", "attn_pooler_queries", "attn_pooler_heads"}),
    off_values={"pool_type": "tok", "pos_embed_type": "learnable", "block_type": "default"},
)
# What timm has and is not built here, by the beginning of its name, with what is near; another name
# is near by its spelling.
_NOT_BUILT = {
    "fastvit": ("a FastViT", "vit_large_patch14_clip_224"),
    "vit_base_mci": (
        "a vision transformer with a convolutional stem",
        "vit_base_patch16_clip_224",
    ),
    "naflexvit": (
        "a NaFlex vision transformer, of any picture size",
        "vit_base_patch16_siglip_256",
    ),
    "eva": ("an EVA vision transformer", "vit_pe_core_large_patch14_336"),
    "vitamin": ("a ViTamin", "vit_large_patch14_clip_224"),
    "convnext": ("a ConvNeXt", "vit_base_patch32_clip_224"),
    "resnet": ("a ResNet", "vit_base_patch32_clip_224"),
    "swin": ("a Swin transformer", "vit_base_patch16_clip_224"),
}
_PROJECTIONS = {"linear": "linear", "none": "none", "": "head", None: "head"}


def read_timm_vision(section: JsonSection, embed_dim: int) -> TimmVisionConfig:
    """The tower that OpenCLIP would have timm build.

    Raises:
        InputError: a trunk or a switch that is not built here, a value of the wrong type, or sizes
            that do not fit each other.
    """
    trunk = _read_trunk(section)
    size = trunk.size
    width = section.integer("width", size.width)
    heads = width // section.integer("head_width", size.width // size.heads)
    if heads == 0 or width % heads or (trunk.rotary and width // heads % 4):
        unit = "a multiple of 4" if trunk.rotary else "a part"
        raise section.error(
            f"vision_cfg.width {width} cannot be cut into heads of {unit} of it; choose another "
            "vision_cfg.head_width"
        )
    pool_name = section.choice("timm_pool", "avg", ("map", "token"))
    if pool_name == "token" and not trunk.class_token:
        raise section.error(
            "vision_cfg.timm_pool = 'token' needs a class token, which "
            f"{section.values['timm_model_name']} has not; use map"
        )
    mlp_width = section.mlp_width(width, size.mlp_ratio)
    if trunk.rotary and section.options("act_kwargs"):
        raise section.error(
            f"vision_cfg.act_kwargs {section.values['act_kwargs']}: timm builds "
            f"{section.values['timm_model_name']} with exact GELU alone; leave it out"
        )
    activation = section.gelu("act_kwargs", trunk.activation)
    pool = None
    if pool_name == "map":
        pool_ratio = trunk.pool_mlp_ratio
        pool = AttentionPoolConfig(
            width,
            heads=trunk.pool_heads or heads,
            mlp_width=mlp_width if pool_ratio is None else int(width * pool_ratio),
            activation=activation,
        )
        if width % pool.heads:
            raise section.error(
                f"vision_cfg.width {width} is not divisible by the {pool.heads} heads of the "
                f"attention pool; the nearest below that is {width // pool.heads * pool.heads}"
            )
    if trunk.rotary and section.fraction("patch_dropout"):
        raise section.error(
            f"vision_cfg.patch_dropout {section.values['patch_dropout']} with rotary positions is "
            "not built here; set it to 0"
        )
    projection = _read_projection(section, trunk, pool_name)
    if projection == "none" and width != embed_dim:
        raise section.error(
            f"embed_dim {embed_dim} has to be vision_cfg.width {width} where vision_cfg.timm_proj "
            "is 'none'"
        )
    vision = TimmVisionConfig(
        width=width,
        layers=section.integer("layers", size.layers),
        heads=heads,
        mlp_width=mlp_width,
        image_size=section.pair("image_size", trunk_size(section.values["timm_model_name"])),
        patch_size=section.pair("patch_size", trunk.patch_size),
        layer_scale=None,
        activation=activation,
        norm_eps=section.norm_eps("norm_kwargs", trunk.norm_eps),
        class_token=trunk.class_token,
        pre_norm=trunk.pre_norm,
        pool=pool,
        projection=projection,
        projection_bias=projection == "linear" and section.flag("timm_proj_bias"),
        rotary=trunk.rotary,
        patch_dropout=section.fraction("patch_dropout"),
        drop_path=section.fraction("timm_drop_path"),
        eva=trunk.rotary is not None,
    )
    check_patches(section, vision)
    return vision


def check_patches(section: JsonSection, vision: ImageTowerConfig) -> None:
    """InputError: a picture is smaller than a patch."""
    if vision.patches == 0:
        raise section.error(
            f"vision_cfg.patch_size {vision.patch_size} is larger than vision_cfg.image_size "
            f"{vision.image_size}: a picture has no whole patch"
        )


def _read_trunk(section: JsonSection) -> Trunk:
    name = section.optional_text("timm_model_name")
    if name in TRUNKS:
        return TRUNKS[name]
    found = (_NOT_BUILT[begin] for begin in _NOT_BUILT if name.startswith(begin))
    what, near = next(found, (None, get_close_matches(name, TRUNKS, n=1, cutoff=0)[0]))
    raise section.error(
        f"vision_cfg.timm_model_name = {name!r} is {f'{what}, which is ' if what else ''}not built "
        f"here; the nearest that is: {near}. There are the vision transformers of SigLIP, SigLIP "
        "2, PE-Core and MobileCLIP2-L-14"
    )


def _read_projection(section: JsonSection, trunk: Trunk, pool: str) -> str:
    given = section.values.get("timm_proj", "linear")
    if not isinstance(given, str | None) or given not in _PROJECTIONS:
        raise section.error(
            f"vision_cfg.timm_proj = {given!r} is not supported; use linear, none or null"
        )
    projection = _PROJECTIONS[given]
    if projection != "linear":
        return projection
    if pool == "map" and trunk.pool != "map":
        raise section.error(
            f"vision_cfg.timm_pool = 'map' with timm_proj linear: timm cannot give "
            f"{section.values['timm_model_name']} attention pooling after it is built, as OpenCLIP "
            "would have it do; use timm_proj none or null, or timm_pool token"
        )
    if section.number("timm_drop", 0.0):
        raise section.error(
            "vision_cfg.timm_drop (dropout before the projection) is not built here"
        )
    return projection
