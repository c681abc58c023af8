"""Facts of Hugging Face's CLIPModel and SiglipModel that their config.json goes by."""

from __future__ import annotations

from typing import Any

from parallel_clip.model.towers.transformer import Activation

Json = dict[str, Any]

# What transformers 5.24 takes for a key that is not there; those of no effect are left out.
CLIP_DEFAULTS: Json = {
    "projection_dim": 512,
    "logit_scale_init_value": 2.6592,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
SIGLIP_DEFAULTS: Json = {
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
}

# The first of each is the one that is written.
ACTIVATIONS: dict[Activation, tuple[str, ...]] = {
    "quick_gelu": ("quick_gelu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast"),
}

LEGACY_EOS = 2
"""The eos_token_id with which CLIPModel pools where the token's id is highest, as OpenCLIP's
pool_type "argmax" does; with any other it pools at the first such token ("eos")."""
