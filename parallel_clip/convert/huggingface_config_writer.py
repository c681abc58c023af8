"""The `config.json` of a CLIPModel or SiglipModel of Hugging Face, for one of our models.

What these classes cannot be told is an error that names every switch. The other direction:
huggingface_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from parallel_clip.convert.huggingface_defaults import (
    ACTIVATIONS,
    CLIP_DEFAULTS,
    LEGACY_EOS,
    Json,
)
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.towers.timm_vision import TimmVisionConfig
from parallel_clip.model.towers.transformer import ImageTowerConfig, TowerConfig


def is_siglip(architecture: Architecture) -> bool:
    """Whether a model would be a SiglipModel rather than a CLIPModel."""
    return isinstance(architecture.vision, TimmVisionConfig)


def huggingface_config(architecture: Architecture, dtype: str) -> Json:
    """`config.json`; dtype: of the weights, as torch calls it ("float32").

    Raises:
        InputError: the model is neither a CLIPModel nor a SiglipModel.
    """
    siglip = is_siglip(architecture)
    name = "SiglipModel" if siglip else "CLIPModel"
    problems = list(_siglip_problems(architecture) if siglip else _clip_problems(architecture))
    if problems:
        raise InputError(
            f"{architecture.name} cannot be written as a {name} of Hugging Face: "
            f"{'; '.join(problems)}; --to openclip keeps it as it is"
        )
    config = {"architectures": [name], "dtype": dtype}
    return config | (_siglip_config(architecture) if siglip else _clip_config(architecture))


def _clip_problems(architecture: Architecture) -> Iterator[str]:
    vision, text = architecture.vision, architecture.text
    if vision.pool != "tok":
        yield f"vision_cfg.pool_type is {vision.pool!r}, and it pools at the class token"
    if not vision.pre_norm:
        yield "vision_cfg.no_ln_pre is on, and it has a norm before the first block"
    yield from _shared_problems(architecture)
    if not text.causal:
        yield "text_cfg.no_causal_mask is on, and its text tower is causal"
    if text.projection != "matrix":
        yield "the text projection has a bias or is none, and it has one without bias"
    if text.pool not in ("argmax", "eos"):
        yield f"text_cfg.pool_type is {text.pool!r}, and it pools at the end of the text"
    elif text.pool == "eos" and text.eos_id == LEGACY_EOS:
        yield f"text_cfg.eos_id is {LEGACY_EOS}, which means pool_type 'argmax' to it"


def _siglip_problems(architecture: Architecture) -> Iterator[str]:
    vision, text = architecture.vision, architecture.text
    trunk = architecture.json["vision_cfg"]["timm_model_name"]
    if vision.rotary or vision.class_token or vision.pre_norm or vision.pool is None:
        yield f"{trunk} is no trunk of SigLIP's"
    elif (vision.pool.heads, vision.pool.mlp_width, vision.pool.activation) != (
        vision.heads,
        vision.mlp_width,
        vision.activation,
    ):
        yield "the attention pool has another shape or activation than the blocks"
    if vision.projection != "none":
        yield "vision_cfg.timm_proj is not 'none', and it has no projection of pictures"
    yield from _shared_problems(architecture)
    if text.causal:
        yield "text_cfg.no_causal_mask is off, and its text tower is not causal"
    if text.projection != "linear":
        yield "text_cfg.proj_bias is off, and its text projection has a bias"
    if text.pool != "last":
        yield f"text_cfg.pool_type is {text.pool!r}, and it pools at the last token"
    if architecture.init_logit_bias is None:
        yield "it has no logit_bias"


def _shared_problems(architecture: Architecture) -> Iterator[str]:
    vision, text = architecture.vision, architecture.text
    for kind, size in (("image", vision.image_size), ("patch", vision.patch_size)):
        if size[0] != size[1]:
            yield f"vision_cfg.{kind}_size is {list(size)}, and it takes squares"
    for section, tower in (("vision_cfg", vision), ("text_cfg", text)):
        if tower.layer_scale is not None:
            yield f"{section}.ls_init_value is set, and it has no LayerScale"
    clean = text.tokenizer_kwargs.get("clean", "lower")
    if text.tokenizer is None and clean != "lower":
        yield f"text_cfg.tokenizer_kwargs.clean is {clean!r}, and CLIP's own tokenizer has 'lower'"
    if text.tokenizer_kwargs.get("strip_sep_token"):
        yield "text_cfg.tokenizer_kwargs.strip_sep_token is on, which its tokenizers cannot do"
    others = sorted(text.tokenizer_kwargs.keys() - {"clean", "strip_sep_token"})
    if others:
        yield f"text_cfg.tokenizer_kwargs has {', '.join(others)}, which its tokenizers cannot do"


def _clip_config(architecture: Architecture) -> Json:
    text, scale = architecture.text, architecture.init_logit_scale
    default_scale = CLIP_DEFAULTS["logit_scale_init_value"]
    shared = {"projection_dim": architecture.embed_dim}
    ends = {"eos_token_id": LEGACY_EOS if text.pool == "argmax" else text.eos_id}
    return {
        "model_type": "clip",
        **shared,
        "logit_scale_init_value": default_scale if scale is None else scale,
        "text_config": {"model_type": "clip_text_model", **_text(architecture), **ends, **shared},
        "vision_config": {
            "model_type": "clip_vision_model", **_vision(architecture.vision), **shared
        },
    }  # fmt: skip


def _siglip_config(architecture: Architecture) -> Json:
    text = _text(architecture) | {"eos_token_id": None, "projection_size": architecture.embed_dim}
    vision = _vision(architecture.vision) | {"vision_use_head": True}
    return {
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
    }


def _text(architecture: Architecture) -> Json:
    """The numbers of tokens decide nothing in the model, but for CLIP's end of text; transformers'
    defaults for them may lie outside the vocabulary."""
    return {
        **_tower(architecture.text),
        "vocab_size": architecture.text.vocab_size,
        "max_position_embeddings": architecture.text.context_length,
        "bos_token_id": None,
        "pad_token_id": None,
    }


def _vision(vision: ImageTowerConfig) -> Json:
    return {
        **_tower(vision),
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size[0],
        "num_channels": 3,
    }


def _tower(tower: TowerConfig) -> Json:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": ACTIVATIONS[tower.activation][0],
        "layer_norm_eps": tower.norm_eps,
    }
