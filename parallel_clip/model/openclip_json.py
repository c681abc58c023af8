"""OpenCLIP's model-config JSON: which keys it has, which switches are not built here, and reading
an Architecture from it."""

from copy import deepcopy
from typing import Any

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.json_section import JsonSection, SectionKeys
from parallel_clip.model.timm_json import TIMM_VISION_KEYS, check_patches, read_timm_vision
from parallel_clip.model.towers.text import TextConfig
from parallel_clip.model.towers.transformer import Activation
from parallel_clip.model.towers.vision import VisionConfig


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of both towers: switches for blocks that are not built here.
OTHER_BLOCKS = {
    "block_type": "another block",
    "qk_norm": "normalised queries and keys",
    "scaled_cosine_attn": "scaled cosine attention",
    "scale_heads": "a scale for each head",
    "scale_attn_inner": "a norm inside attention",
    "scale_attn": "a norm after attention",
    "scale_fc": "a norm inside the MLP",
}

MODEL_KEYS = SectionKeys(
    read=_names(
        "embed_dim vision_cfg text_cfg quick_gelu init_logit_scale init_logit_bias custom_text"
    ),
    unsupported={
        "multimodal_cfg": "CoCa's captioning decoder",
        "nonscalar_logit_scale": "logit_scale of shape [1]",
    },
    without_effect=_names("output_dict"),
)

VISION_KEYS = SectionKeys(
    read=_names(
        "layers width head_width mlp_ratio patch_size image_size ls_init_value patch_dropout "
        "no_ln_pre final_ln_after_pool pool_type act_kwargs norm_kwargs"
    ),
    unsupported={
        "attentional_pool": "attentional pooling",
        "pos_embed_type": "fixed positions",
        "output_tokens": "token outputs",
        **OTHER_BLOCKS,
    },
    without_effect=_names(
        "attn_pooler_heads attn_pooler_queries timm_drop timm_drop_path timm_model_name "
        "timm_model_pretrained timm_pool timm_proj timm_proj_bias"
    ),
    off_values={"pos_embed_type": "learnable", "block_type": "default"},
)

TEXT_KEYS = SectionKeys(
    read=_names(
        "layers width mlp_ratio ls_init_value pool_type act_kwargs norm_kwargs context_length "
        "vocab_size hf_tokenizer_name tokenizer_kwargs heads eos_id no_causal_mask proj_bias "
        "proj_type"
    ),
    unsupported={
        "hf_model_name": "a text tower of Hugging Face",
        "embed_cls": "a class token in the text",
        "final_ln_after_pool": "the final norm after pooling",
        "output_tokens": "token outputs",
        "tokenizer_mode": "another tokenizer mode",
        **OTHER_BLOCKS,
    },
    without_effect=_names("hf_model_pretrained hf_pooler_type hf_proj_type pad_id"),
    off_values={"block_type": "default"},
)


def architecture_from_json(cfg: dict[str, Any], name: str) -> Architecture:
    """The model that OpenCLIP would build from `cfg`; `name` is for messages and records.

    Raises InputError for a switch that is not built here, an unknown key, a value of the wrong
    type, and for sizes that do not fit each other.
    """
    model = JsonSection(cfg, "model", name, MODEL_KEYS)
    for key in ("vision_cfg", "text_cfg"):
        if key not in model.values:
            raise model.error(f"{key} is missing")
    vision = JsonSection(cfg["vision_cfg"], "vision_cfg", name, VISION_KEYS)
    is_timm = bool(vision.values.get("timm_model_name"))
    if is_timm:
        vision = JsonSection(cfg["vision_cfg"], "vision_cfg", name, TIMM_VISION_KEYS)
    text = JsonSection(cfg["text_cfg"], "text_cfg", name, TEXT_KEYS)

    unsupported = [switch for s in (model, vision, text) for switch in s.unsupported()]
    if isinstance(vision.values.get("layers"), list):
        unsupported.append(f"vision_cfg.layers = {vision.values['layers']} (a ModifiedResNet)")
    if unsupported:
        raise model.error(
            f"not supported: {'; '.join(unsupported)}; parallel_clip trains vision transformers "
            "with OpenCLIP's own text transformer, such as ViT-B-32 (docs/models.md)"
        )
    for section in (model, vision, text):
        section.check_keys()

    quick_gelu, embed_dim = model.flag("quick_gelu"), model.integer("embed_dim")
    return Architecture(
        name=name,
        embed_dim=embed_dim,
        # OpenCLIP's quick_gelu is for its own towers.
        vision=read_timm_vision(vision, embed_dim) if is_timm else _read_vision(vision, quick_gelu),
        text=_read_text(text, quick_gelu, embed_dim),
        init_logit_scale=model.optional_number("init_logit_scale"),
        init_logit_bias=model.optional_number("init_logit_bias"),
        # OpenCLIP goes by the presence of hf_model_name, even when it is null.
        custom_text=model.flag("custom_text") or "hf_model_name" in text.values,
        json=deepcopy(cfg),
    )


def _read_vision(section: JsonSection, quick_gelu: bool) -> VisionConfig:
    width = section.integer("width", 768)
    head_width = section.integer("head_width", 64)
    heads = width // head_width
    if heads == 0 or width % heads:
        raise section.error(
            f"vision_cfg.width {width} cannot be cut into heads of vision_cfg.head_width "
            f"{head_width}; choose a multiple of {head_width}"
        )
    vision = VisionConfig(
        width=width,
        layers=section.integer("layers", 12),
        heads=heads,
        mlp_width=section.mlp_width(width),
        image_size=section.pair("image_size", 224),
        patch_size=section.pair("patch_size", 16),
        pool=section.choice("pool_type", "tok", ("tok", "avg")),
        final_norm_after_pool=section.flag("final_ln_after_pool"),
        pre_norm=not section.flag("no_ln_pre"),
        layer_scale=section.optional_number("ls_init_value"),
        patch_dropout=section.fraction("patch_dropout"),
        activation=_activation(section, quick_gelu),
        norm_eps=section.norm_eps("norm_kwargs"),
    )
    check_patches(section, vision)
    return vision


def _read_text(section: JsonSection, quick_gelu: bool, embed_dim: int) -> TextConfig:
    width = section.integer("width", 512)
    heads = section.integer("heads", 8)
    if width % heads:
        raise section.error(
            f"text_cfg.width {width} is not divisible by text_cfg.heads {heads}; the nearest "
            f"width below that is {width // heads * heads}"
        )
    projection = "linear" if section.flag("proj_bias") else "matrix"
    if section.choice("proj_type", "linear", ("linear", "none")) == "none":
        projection = "none"
        if width != embed_dim:
            raise section.error(
                f"embed_dim {embed_dim} has to be text_cfg.width {width} where text_cfg.proj_type "
                "is 'none'"
            )
    text = TextConfig(
        width=width,
        layers=section.integer("layers", 12),
        heads=heads,
        mlp_width=section.mlp_width(width),
        context_length=section.integer("context_length", 77),
        vocab_size=section.integer("vocab_size", 49408),
        pool=section.choice("pool_type", "argmax", ("argmax", "last", "eos", "first")),
        causal=not section.flag("no_causal_mask"),
        eos_id=section.integer("eos_id", 2, minimum=0),
        projection=projection,
        layer_scale=section.optional_number("ls_init_value"),
        activation=_activation(section, quick_gelu),
        norm_eps=section.norm_eps("norm_kwargs"),
        tokenizer=section.optional_text("hf_tokenizer_name"),
        tokenizer_kwargs=section.options("tokenizer_kwargs"),
    )
    if text.pool == "eos" and text.eos_id >= text.vocab_size:
        raise section.error(
            f"text_cfg.eos_id {text.eos_id} lies outside text_cfg.vocab_size {text.vocab_size}"
        )
    return text


def _activation(section: JsonSection, quick_gelu: bool) -> Activation:
    if not quick_gelu:
        return section.gelu("act_kwargs")
    options = section.options("act_kwargs")
    if options:
        raise section.error(
            f"{section.key('act_kwargs')} {options} belongs to GELU and quick_gelu is on; "
            "remove one of them"
        )
    return "quick_gelu"
