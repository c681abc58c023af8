"""OpenAI's own CLIP checkpoints: which model they are of, by the shapes of their tensors.

They name no config. Their state dicts hold `input_resolution`, `context_length` and `vocab_size`,
which tells them from others; all are of models with QuickGELU and heads 64 wide (open_clip's
`build_model_from_openai_state_dict` reads them so, too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import known_name
from parallel_clip.model.openclip_json import architecture_from_json

_MARKS = ("input_resolution", "context_length", "vocab_size")

Shapes = Mapping[str, tuple[int, ...]]


def openai_architecture(shapes: Shapes, file: Path) -> Architecture | None:
    """The model of OpenAI's state dict with tensors of these shapes; None where it is no such.

    Raises:
        InputError: it is a ResNet, or lacks tensors that say which model it is.
    """
    prefix = next((n.removesuffix(_MARKS[0]) for n in shapes if n.endswith(_MARKS[0])), "")
    shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    if not all(mark in shapes for mark in _MARKS):
        return None
    if any(name.startswith("visual.layer1.") for name in shapes):
        raise InputError(
            f"{file} is one of OpenAI's ResNets; parallel_clip trains plain vision transformers, "
            "such as OpenAI's ViT-B-32"
        )
    try:
        config = _config(shapes)
    except (KeyError, ValueError, IndexError):
        raise InputError(
            f"{file} looks like a checkpoint of OpenAI's, and tensors that say which model it is "
            "of are missing or have another shape"
        ) from None
    architecture = architecture_from_json(config, file.stem)
    return replace(architecture, name=known_name(architecture) or file.stem)


def _config(shapes: Shapes) -> dict[str, Any]:
    vision_width, _, patch_size, _ = shapes["visual.conv1.weight"]
    patches = shapes["visual.positional_embedding"][0] - 1
    (text_width,) = shapes["ln_final.weight"]
    return {
        "embed_dim": shapes["text_projection"][1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": patch_size * math.isqrt(patches),
            "layers": _layers(shapes, "visual.transformer.resblocks."),
            "width": vision_width,
            "patch_size": patch_size,
        },
        "text_cfg": {
            "context_length": shapes["positional_embedding"][0],
            "vocab_size": shapes["token_embedding.weight"][0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": _layers(shapes, "transformer.resblocks."),
        },
    }


def _layers(shapes: Shapes, prefix: str) -> int:
    blocks = (name.removeprefix(prefix) for name in shapes if name.startswith(prefix))
    return len({block.split(".")[0] for block in blocks})
