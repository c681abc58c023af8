"""The models of OpenCLIP 3.3.0 whose image tower is timm's and that are known by name: SigLIP (11),
SigLIP 2 at fixed sizes (15), PE-Core (5) and MobileCLIP2-L-14.

Facts only; `timm_model_config` puts them together in OpenCLIP's JSON form, key for key what
OpenCLIP has in its file of that name.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple


class TextSize(NamedTuple):
    width: int
    heads: int
    layers: int
    mlp_ratio: float | None = None


TEXT_SIZES = {
    "S": TextSize(512, 8, 12),
    "B": TextSize(768, 12, 12),
    "L": TextSize(1024, 16, 24),
    "bigG": TextSize(1280, 20, 24),
    "SO400M": TextSize(1152, 16, 27, 3.7362),
}

_SIGLIP_TEXT = {
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
_TANH = {"act_kwargs": {"approximate": "tanh"}}
_PROJECTED = {"proj_bias": True}

# By what a name has in it: words of the vocabulary, and what is beside `_SIGLIP_TEXT`.
_SIGLIP_KINDS = {
    "SigLIP2": (256_000, _PROJECTED | _TANH),
    "SigLIP-i18n": (250_000, _PROJECTED),
    "SigLIP": (32_000, _PROJECTED),
}

#   name                              trunk of timm, vit_...        image  text
SIGLIP = {
    "ViT-B-16-SigLIP":               ("base_patch16_siglip_224",       224, "B"),
    "ViT-B-16-SigLIP-256":           ("base_patch16_siglip_256",       256, "B"),
    "ViT-B-16-SigLIP-384":           ("base_patch16_siglip_384",       384, "B"),
    "ViT-B-16-SigLIP-512":           ("base_patch16_siglip_512",       512, "B"),
    "ViT-B-16-SigLIP-i18n-256":      ("base_patch16_siglip_256",       256, "B"),
    "ViT-L-16-SigLIP-256":           ("large_patch16_siglip_256",      256, "L"),
    "ViT-L-16-SigLIP-384":           ("large_patch16_siglip_384",      384, "L"),
    "ViT-SO400M-14-SigLIP":          ("so400m_patch14_siglip_224",     224, "SO400M"),
    "ViT-SO400M-14-SigLIP-378":      ("so400m_patch14_siglip_378",     378, "SO400M"),
    "ViT-SO400M-14-SigLIP-384":      ("so400m_patch14_siglip_384",     384, "SO400M"),
    "ViT-SO400M-16-SigLIP-i18n-256": ("so400m_patch16_siglip_256",     256, "SO400M"),
    "ViT-B-32-SigLIP2-256":          ("base_patch32_siglip_256",       256, "B"),
    "ViT-B-16-SigLIP2":              ("base_patch16_siglip_224",       224, "B"),
    "ViT-B-16-SigLIP2-256":          ("base_patch16_siglip_256",       256, "B"),
    "ViT-B-16-SigLIP2-384":          ("base_patch16_siglip_384",       384, "B"),
    "ViT-B-16-SigLIP2-512":          ("base_patch16_siglip_512",       512, "B"),
    "ViT-L-16-SigLIP2-256":          ("large_patch16_siglip_256",      256, "L"),
    "ViT-L-16-SigLIP2-384":          ("large_patch16_siglip_384",      384, "L"),
    "ViT-L-16-SigLIP2-512":          ("large_patch16_siglip_512",      512, "L"),
    "ViT-SO400M-14-SigLIP2":         ("so400m_patch14_siglip_224",     224, "SO400M"),
    "ViT-SO400M-14-SigLIP2-378":     ("so400m_patch14_siglip_378",     378, "SO400M"),
    "ViT-SO400M-16-SigLIP2-256":     ("so400m_patch16_siglip_256",     256, "SO400M"),
    "ViT-SO400M-16-SigLIP2-384":     ("so400m_patch16_siglip_384",     384, "SO400M"),
    "ViT-SO400M-16-SigLIP2-512":     ("so400m_patch16_siglip_512",     512, "SO400M"),
    "ViT-gopt-16-SigLIP2-256":       ("giantopt_patch16_siglip_256",   256, "SO400M"),
    "ViT-gopt-16-SigLIP2-384":       ("giantopt_patch16_siglip_384",   384, "SO400M"),
}  # fmt: skip

#   name                    trunk                        image  text    words of a text
PE_CORE = {
    "PE-Core-T-16-384":     ("tiny_patch16_384",           384, "S",    32),
    "PE-Core-S-16-384":     ("small_patch16_384",          384, "S",    32),
    "PE-Core-B-16":         ("base_patch16_224",           224, "L",    32),
    "PE-Core-L-14-336":     ("large_patch14_336",          336, "L",    32),
    "PE-Core-bigG-14-448":  ("gigantic_patch14_448",       448, "bigG", 72),
}  # fmt: skip

MOBILE_CLIP = "MobileCLIP2-L-14"

# What a file of OpenCLIP's has otherwise than the others of its kind.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ViT-SO400M-14-SigLIP": {"context_length": 16},
    "ViT-SO400M-16-SigLIP-i18n-256": {"proj_bias": None, "proj_type": "none"},
}

TIMM_MODELS = (*SIGLIP, *PE_CORE, MOBILE_CLIP)


def timm_model_config(name: str) -> dict[str, Any]:
    """The model called `name`, one of `TIMM_MODELS`, as OpenCLIP's JSON has it; a new dict each
    time."""
    if name in SIGLIP:
        config = _siglip(name)
    elif name in PE_CORE:
        config = _pe_core(name)
    else:
        config = _mobile_clip()
    text = config["text_cfg"] | _EXCEPTIONS.get(name, {})
    config["text_cfg"] = {key: value for key, value in text.items() if value is not None}
    return deepcopy(config)


def _siglip(name: str) -> dict[str, Any]:
    trunk, image_size, text_size = SIGLIP[name]
    kind = next(kind for kind in _SIGLIP_KINDS if kind in name)
    words, switches = _SIGLIP_KINDS[kind]
    # All of SigLIP share one tokenizer, all of its multilingual ones another.
    tokenizer = {"SigLIP": "ViT-B-16-SigLIP", "SigLIP-i18n": "ViT-B-16-SigLIP-i18n-256"}
    text = _text(text_size, 64, words) | _SIGLIP_TEXT | switches
    text["hf_tokenizer_name"] = f"timm/{tokenizer.get(kind, name)}"
    # Without a projection of its own the text tower's features are as wide as it.
    embed_dim = 1536 if "gopt" in name else text["width"]
    vision = _vision(f"vit_{trunk}", image_size, "map", "none")
    return {
        "embed_dim": embed_dim,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def _pe_core(name: str) -> dict[str, Any]:
    trunk, image_size, text_size, words = PE_CORE[name]
    text = _text(text_size, words, 49_408)
    return {
        "embed_dim": text["width"],
        "vision_cfg": _vision(f"vit_pe_core_{trunk}", image_size, "map", None),
        "text_cfg": text,
        "custom_text": True,
    }


def _mobile_clip() -> dict[str, Any]:
    vision = _vision("vit_large_patch14_clip_224", 224, "token", None)
    return {
        "embed_dim": 768,
        "vision_cfg": vision | {"timm_drop": 0.0, "timm_drop_path": 0.1},
        "text_cfg": _text("B", 77, 49_408) | {"no_causal_mask": True},
        "custom_text": True,
    }


def _vision(trunk: str, image_size: int, pool: str, projection: str | None) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "timm_model_name": trunk,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": projection,
    }


def _text(size: str, context_length: int, vocabulary: int) -> dict[str, Any]:
    sizes = {key: value for key, value in TEXT_SIZES[size]._asdict().items() if value is not None}
    return {"context_length": context_length, "vocab_size": vocabulary} | sizes
