"""Small models with every switch of the known ones, for the comparison with OpenCLIP.

Where its kind allows, each has an odd number of tokens, widths that are no power of two, a
truncated MLP width (int(80 * 4.231) = 338, int(48 * 4.32) = 207) or a vocabulary that does not
divide: layouts must not show in the awkward cases either.
"""

from typing import Any

END_OF_TEXT = 49407


def model_cfg(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **model: Any
) -> dict[str, Any]:
    """17 image tokens of width 64, 77 text tokens of width 48, 4 heads each."""
    base_vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16}
    base_text = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}
    return {
        "embed_dim": 32,
        "vision_cfg": base_vision | (vision or {}),
        "text_cfg": base_text | (text or {}),
        **model,
    }


MODELS: dict[str, dict[str, Any]] = {
    "plain": model_cfg(),
    "quickgelu-layerscale": model_cfg(
        vision={"ls_init_value": 0.1, "mlp_ratio": 4.231, "width": 80, "head_width": 20},
        text={"ls_init_value": 0.2, "layers": 3},
        quick_gelu=True,
    ),
    "clipa": model_cfg(
        vision={"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        text={"context_length": 32, "pool_type": "last", "no_causal_mask": True},
    ),
    "patch-dropout": model_cfg(vision={"patch_dropout": 0.5, "patch_size": 6, "image_size": 30}),
    "three-heads": model_cfg(
        vision={"width": 48, "head_width": 16, "mlp_ratio": 4.32, "layers": 3},
        text={"heads": 3, "vocab_size": 49409, "pool_type": "eos", "eos_id": END_OF_TEXT},
    ),
    "six-heads": model_cfg(
        vision={"width": 96, "head_width": 16, "patch_size": 16},
        text={"width": 72, "heads": 6, "context_length": 23},
    ),
    "siglip": model_cfg(
        vision={"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}},
        text={
            "context_length": 64,
            "pool_type": "last",
            "proj_bias": True,
            "no_causal_mask": True,
            "norm_kwargs": {"eps": 1e-6},
        },
        init_logit_scale=2.302585092994046,
        init_logit_bias=-10,
        custom_text=True,
    ),
    # Of other depths, which few numbers of stages divide.
    "uneven": model_cfg(vision={"layers": 5, "ls_init_value": 0.1}, text={"layers": 2}),
    "wide-picture": model_cfg(
        vision={"image_size": [24, 40], "pool_type": "avg"},
        text={"pool_type": "first", "no_causal_mask": True},
    ),
}


def timm_cfg(trunk: str, text: dict[str, Any] | None = None, **vision: Any) -> dict[str, Any]:
    """An image tower of timm, cut down to 16 or 17 tokens of width 64."""
    config = model_cfg(text=text, custom_text=True)
    small = config["vision_cfg"] | {"timm_model_name": trunk, "layers": 3}
    return config | {"vision_cfg": small | vision}


# The families whose image tower is timm's.
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "timm-siglip": timm_cfg(
        "vit_so400m_patch16_siglip_256",
        {
            "context_length": 64,
            "pool_type": "last",
            "proj_bias": True,
            "no_causal_mask": True,
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
        timm_pool="map",
        timm_proj="none",
        image_size=40,
        mlp_ratio=3.76,  # of 64: 240
    )
    | {"embed_dim": 64, "init_logit_scale": 2.302585092994046, "init_logit_bias": -10},
    "timm-pe-core": timm_cfg(
        "vit_pe_core_base_patch16_224",
        {"context_length": 32},
        timm_pool="map",
        timm_proj=None,
    ),
    "timm-mobile-clip": timm_cfg(
        "vit_large_patch14_clip_224",
        {"no_causal_mask": True},
        timm_pool="token",
        timm_proj=None,
    ),
}
MODELS |= TIMM_MODELS
