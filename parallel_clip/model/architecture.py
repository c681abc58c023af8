"""What a CLIP model is: widths, depths, switches. Read from OpenCLIP's JSON or known by name."""

from dataclasses import dataclass, field
from typing import Any

from parallel_clip.model.towers.text import TextConfig
from parallel_clip.model.towers.vision import VisionConfig


@dataclass(frozen=True)
class Architecture:
    """Both towers and what joins them.

    Two architectures are equal when they are the same model, whatever they are called.
    `init_logit_scale` and `init_logit_bias` are None where the JSON does not say. `custom_text`
    chooses OpenCLIP's names of parameters: with it those of the text tower begin with "text.".
    `json` is the model config as it was given, in OpenCLIP's own keys.
    """

    name: str = field(compare=False)
    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    init_logit_scale: float | None
    init_logit_bias: float | None
    custom_text: bool
    json: dict[str, Any] = field(compare=False, repr=False)
