"""What a CLIP model is: its towers, what joins them, the table of its parameters, and its costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel_clip.model.parameters import Constant, Parameter, with_prefix
from parallel_clip.model.towers.text import TextConfig
from parallel_clip.model.towers.transformer import ImageTowerConfig
from parallel_clip.stages.costs import ModelCosts

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


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
    vision: ImageTowerConfig
    text: TextConfig
    init_logit_scale: float | None
    init_logit_bias: float | None
    custom_text: bool
    json: dict[str, Any] = field(compare=False, repr=False)

    def settings(self) -> dict[str, Any]:
        """What decides the model's features, by OpenCLIP's keys ("vision_cfg.pool_type"), defaults
        filled in. Initial values and what matters in training alone are left out."""
        vision, text = self.tower_settings("vision"), self.tower_settings("text")
        return {"embed_dim": self.embed_dim, **vision, **text}

    def tower_settings(self, tower: Literal["vision", "text"]) -> dict[str, Any]:
        """Those of one tower."""
        return {
            # OpenCLIP has one activation for both towers.
            key if key == "quick_gelu" else f"{tower}_cfg.{key}": value
            for key, value in getattr(self, tower).settings().items()
        }

    @property
    def costs(self) -> ModelCosts:
        """What arithmetic on layouts needs to know of the model."""
        vision, text = self.vision.costs(self.embed_dim), self.text.costs(self.embed_dim)
        return ModelCosts(self.name, self.embed_dim, vision, text)


def parameter_table(architecture: Architecture) -> list[Parameter]:
    """Every parameter of the model: logit parameters, image tower, text tower."""
    scale, bias = architecture.init_logit_scale, architecture.init_logit_bias
    initial = Constant(DEFAULT_LOGIT_SCALE if scale is None else scale)
    logits = [Parameter("logit_scale", "logit_scale", (), initial, decayed=False)]
    if bias is not None:
        logits.append(Parameter("logit_bias", "logit_bias", (), Constant(bias), decayed=False))
    vision = architecture.vision.parameters(architecture.embed_dim)
    text = architecture.text.parameters(architecture.embed_dim)
    return [
        *logits,
        *with_prefix("visual.", "vision.", vision),
        *with_prefix("text." if architecture.custom_text else "", "text.", text),
    ]
