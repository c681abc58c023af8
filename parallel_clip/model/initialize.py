"""Initial weights: a function of the seed and a parameter's global name, never of the rank.

Every parameter is drawn in full on the CPU by a generator of its own and then cut by its placement.
Distributions are those that OpenCLIP 3.3.0 ends up with (its own and torch's defaults).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.parameters import Parameter

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


def initial_value(parameter: Parameter, architecture: Architecture, seed: int) -> Tensor:
    """The full initial tensor of a parameter: fp32 on the CPU."""
    generator = torch.Generator().manual_seed(_seed_of(seed, parameter.name))
    value = torch.empty(parameter.shape)
    if parameter.name.startswith("visual."):
        return _vision_value(parameter.name, value, architecture, generator)
    if parameter.name == "logit_scale":
        scale = architecture.init_logit_scale
        return value.fill_(DEFAULT_LOGIT_SCALE if scale is None else scale)
    if parameter.name == "logit_bias":
        return value.fill_(architecture.init_logit_bias)
    return _text_value(parameter.name, value, architecture, generator)


def _vision_value(name: str, value: Tensor, architecture: Architecture, generator) -> Tensor:
    vision = architecture.vision
    if name.endswith((".class_embedding", ".positional_embedding", "visual.proj")):
        return value.normal_(0, vision.width**-0.5, generator=generator)
    if name.endswith("in_proj_weight"):  # Glorot and Bengio (2010), uniform
        bound = math.sqrt(6 / sum(value.shape))
        return value.uniform_(-bound, bound, generator=generator)
    if name.endswith(("conv1.weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")):
        return _torch_linear_default(value, value[0].numel(), generator)
    return _bias_norm_or_scale(name, value, vision, generator)


def _text_value(name: str, value: Tensor, architecture: Architecture, generator) -> Tensor:
    text = architecture.text
    output_std = (2 * text.layers * text.width) ** -0.5
    standard_deviations = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "in_proj_weight": text.width**-0.5,
        "out_proj.weight": output_std,
        "c_fc.weight": (2 * text.width) ** -0.5,
        "c_proj.weight": output_std,
        "text_projection": text.width**-0.5,
        "text_projection.weight": text.width**-0.5,
    }
    for ending, std in standard_deviations.items():
        if name.endswith(ending):
            return value.normal_(0, std, generator=generator)
    return _bias_norm_or_scale(name, value, text, generator)


def _bias_norm_or_scale(name: str, value: Tensor, tower, generator) -> Tensor:
    if name.endswith(".gamma"):
        return value.fill_(tower.layer_scale)
    if name.endswith(".weight"):  # a norm's; every other weight has been dealt with
        return value.fill_(1)
    if name.endswith("c_fc.bias"):
        return _torch_linear_default(value, tower.width, generator)
    if name.endswith("c_proj.bias"):
        return _torch_linear_default(value, tower.mlp_width, generator)
    return value.zero_()


def _torch_linear_default(value: Tensor, fan_in: int, generator) -> Tensor:
    bound = fan_in**-0.5
    return value.uniform_(-bound, bound, generator=generator)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
