"""Small models of transformers, with random weights, in folders as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.small_models import VOCABULARY

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_VISION = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 13, "bos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip

Json = dict[str, Any]


def clip_config(text: Json | None = None, vision: Json | None = None, **config: Any) -> Json:
    """A CLIPModel, by default with QuickGELU, pooled at the highest token."""
    return {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": _TEXT | {"eos_token_id": 2} | (text or {}),
        "vision_config": _VISION | (vision or {}),
        **config,
    }


def siglip_config(text: Json | None = None, vision: Json | None = None) -> Json:
    return {
        "model_type": "siglip",
        "text_config": _TEXT | {"eos_token_id": None, "projection_size": 48} | (text or {}),
        "vision_config": _VISION | (vision or {}),
    }


# Each with the key of transformers that it is about.
CONFIGS: dict[str, Json] = {
    "clip": clip_config(),
    "clip gelu": clip_config({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "clip tanh": clip_config(
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}
    ),
    "clip eos": clip_config({"eos_token_id": 7}, {"layer_norm_eps": 1e-4}),
    "siglip": siglip_config(),
    "siglip gelu": siglip_config(
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "hidden_size": 48},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    ),
}


def build(config: Json) -> transformers.PreTrainedModel:
    """The model of a config, with weights in which no two tensors are alike."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{config['model_type'].title()}Config", None)
    config_class = config_class or transformers.CLIPConfig
    model = transformers.AutoModel.from_config(config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def save(config: Json, folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """Save a model of `config` as transformers does; options: of save_pretrained."""
    model = build(config)
    model.save_pretrained(folder, **options)
    return model


def features(model: transformers.PreTrainedModel, images: Tensor, tokens: Tensor):
    """Normalised features of pictures and of texts."""
    with torch.no_grad():
        found = model(pixel_values=images, input_ids=tokens)
    return found.image_embeds, found.text_embeds


def picture(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """Smooth colours."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize(size, Image.Resampling.BICUBIC)
