"""Small models of each kind that OpenCLIP's plain ViT configs have, and a distance between tensors.

Each has an odd number of tokens in both towers, and a vocabulary that no tensor size divides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 101  # 101 = 2·51 - 1 = 4·26 - 3 = 3·34 - 1
END_OF_TEXT = 7


def small_model(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **model: Any
) -> dict[str, Any]:
    """17 image tokens of width 48, 13 text tokens of width 32, 4 heads each."""
    base_vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 12}
    base_text = {"context_length": 13, "vocab_size": VOCABULARY, "width": 32, "heads": 4}
    return {
        "embed_dim": 24,
        "vision_cfg": base_vision | (vision or {}),
        "text_cfg": base_text | {"layers": 2} | (text or {}),
        **model,
    }


KINDS: dict[str, dict[str, Any]] = {
    "plain": small_model(),
    "quick-gelu": small_model(quick_gelu=True),
    "layer-scale": small_model({"ls_init_value": 0.3}, {"ls_init_value": 0.5, "layers": 3}),
    # int(88 * 3.9091) = 344 and int(40 * 2.35) = 94, as g and H-14's relatives have them
    "truncated-mlp": small_model(
        {"width": 88, "head_width": 44, "mlp_ratio": 3.9091, "layers": 3},
        {"width": 40, "heads": 2, "mlp_ratio": 2.35},
    ),
    "no-pre-norm": small_model({"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}),
    "average-pool": small_model({"pool_type": "avg"}, {"pool_type": "first"}),
    "clipa": small_model(
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        {"context_length": 9, "pool_type": "last", "no_causal_mask": True},
    ),
    "siglip": small_model(
        {"act_kwargs": {"approximate": "tanh"}},
        {"proj_bias": True, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}},
        custom_text=True,
        init_logit_scale=2.3,
        init_logit_bias=-10,
    ),
    "worldwide": small_model(text={"pool_type": "eos", "eos_id": END_OF_TEXT}),
    "oblong": small_model({"image_size": [24, 41], "patch_size": [8, 10]}),
    "patch-dropout": small_model({"patch_dropout": 0.4}),
    "three-heads": small_model(
        {"head_width": 8, "mlp_ratio": 4.32}, {"width": 48, "heads": 3, "mlp_ratio": 3.0}
    ),
    "six-heads": small_model(
        {"width": 96, "head_width": 16, "patch_size": 10}, {"width": 36, "heads": 6}
    ),
}


def timm_model(trunk: str, vision: dict[str, Any], text: dict[str, Any], **model: Any):
    """A model with an image tower of timm, cut down to 4 heads and two layers of width 48."""
    small = {"image_size": 40, "patch_size": 8, "layers": 2, "width": 48, "head_width": 12}
    config = small_model({}, text, custom_text=True, **model)
    return config | {"vision_cfg": {"timm_model_name": trunk} | small | vision}


_MAP = {"timm_pool": "map", "timm_proj": "none"}
_SIGLIP_TEXT = {"proj_bias": True, "pool_type": "last", "no_causal_mask": True}
_SIGLIP = {"embed_dim": 48, "init_logit_bias": -10}

KINDS |= {
    "timm-siglip": timm_model("vit_base_patch16_siglip_224", _MAP, _SIGLIP_TEXT, **_SIGLIP),
    # int(48 * 3.76) = 180 MLP channels
    "timm-siglip2": timm_model(
        "vit_so400m_patch16_siglip_256",
        _MAP | {"mlp_ratio": 3.76, "patch_dropout": 0.4},
        _SIGLIP_TEXT | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}},
        **_SIGLIP,
    ),
    "timm-siglip-i18n": timm_model(
        "vit_so400m_patch16_siglip_256",
        _MAP | {"act_kwargs": {"approximate": "none"}, "norm_kwargs": {"eps": 1e-5}},
        {"width": 48, "pool_type": "last", "no_causal_mask": True, "proj_type": "none"},
        **_SIGLIP,
    ),
    "timm-linear": timm_model(
        "vit_base_patch16_siglip_224",
        {"timm_pool": "map", "timm_proj": "linear", "timm_proj_bias": True},
        {},
    ),
    "timm-pe-core": timm_model(
        "vit_pe_core_base_patch16_224",
        {"timm_pool": "map", "timm_proj": None, "image_size": [40, 24]},
        {},
    ),
    "timm-pe-core-big": timm_model(
        "vit_pe_core_gigantic_patch14_448", {"timm_pool": "map", "timm_proj": None}, {}
    ),
    "timm-mobile-clip": timm_model(
        "vit_large_patch14_clip_224",
        {"timm_pool": "token", "timm_proj": None, "patch_dropout": 0.4},
        {"no_causal_mask": True},
    ),
    "timm-pe-core-token": timm_model(
        "vit_pe_core_base_patch16_224", {"timm_pool": "token", "timm_proj": "linear"}, {}
    ),
    # Its pool attends to the patches alone, that of PE-Core to the class token, too.
    "timm-clip-map": timm_model(
        "vit_large_patch14_clip_224",
        {"timm_pool": "map", "timm_proj": None, "patch_dropout": 0.4},
        {},
    ),
}


def image_batch(model_cfg: dict[str, Any], count: int, seed: int = 0) -> Tensor:
    size = model_cfg["vision_cfg"]["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)


def token_batch(model_cfg: dict[str, Any], count: int, seed: int = 0) -> Tensor:
    """Random ids; each row has END_OF_TEXT once, and the highest id at different places."""
    length = model_cfg["text_cfg"]["context_length"]
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = torch.randint(END_OF_TEXT + 1, VOCABULARY, (count, length), generator=generator)
    places = torch.randint(1, length, (count,), generator=generator)
    tokens[torch.arange(count), places] = END_OF_TEXT
    return tokens


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, as vectors."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
