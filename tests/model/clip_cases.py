"""What ranks do in test_clip.py and test_initialize.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_source
from parallel_clip.engine.groups import Groups
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import load_slice
from tests.ranks import Weights, loaded_model, sum_over_tokens, unsplit_model


class Example(NamedTuple):
    """A model with inputs, and the gradient [2, b, D] that is sent back into its features."""

    model_cfg: dict[str, Any]
    weights: Weights
    images: Tensor
    tokens: Tensor
    feature_grad: Tensor
    kept: Tensor | None = None


class Outcome(NamedTuple):
    """Features [2, b, D], in training and in evaluation mode, and this rank's gradients by name."""

    features: Tensor
    evaluated: Tensor
    gradients: dict[str, Tensor]


def forward_and_backward(
    groups: Groups, examples: dict[str, Example], recompute: list[str]
) -> dict[tuple[str, str], Outcome]:
    return {
        (name, mode): _outcome(groups, example, mode)
        for name, example in examples.items()
        for mode in recompute
    }


def _outcome(groups: Groups, example: Example, recompute: str) -> Outcome:
    model = loaded_model(
        groups,
        example.model_cfg,
        example.weights,
        recompute=recompute,
        sequence=groups.layout.sequence,
    )
    features = model(example.images, example.tokens, example.kept).unflatten(0, (2, -1))
    features.backward(example.feature_grad)
    gradients = {
        parameter.name: sum_over_tokens(tensor, tensor.grad, groups)
        for parameter, tensor in model.global_parameters()
        if tensor.grad is not None
    }
    model.eval()
    with torch.no_grad():
        evaluated = model(example.images, example.tokens).unflatten(0, (2, -1))
    return Outcome(features.detach(), evaluated, gradients)


def features_of_file(
    groups: Groups, model_name: str, weights: Path, images: Tensor, tokens: Tensor
) -> Tensor:
    """Features [2, b, D] of a known model with the weights of an OpenCLIP checkpoint."""
    architecture = load_architecture(model_name)
    source = ModelWeights(open_source(weights), architecture)
    options = ModelOptions(sequence=groups.layout.sequence)
    model = unsplit_model(architecture, options, groups.tensor)
    for parameter, tensor in model.global_parameters():
        load_slice(tensor, parameter, source.read(parameter.name), groups.tensor)
    with torch.no_grad():
        return model(images, tokens).unflatten(0, (2, -1))


def initial_weights(groups: Groups, model_cfg: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """This rank's slices of freshly initialised weights, by name."""
    architecture = architecture_from_json(model_cfg, "small")
    model = unsplit_model(architecture, ModelOptions(), groups.tensor)
    for parameter, tensor in model.global_parameters():
        value = initial_value(parameter, seed)
        load_slice(tensor, parameter, value, model.tensor_group)
    return {parameter.name: tensor.detach() for parameter, tensor in model.global_parameters()}


def dtypes(groups: Groups, model_cfg: dict[str, Any]) -> dict[str, torch.dtype]:
    architecture = architecture_from_json(model_cfg, "small")
    model = unsplit_model(architecture, ModelOptions(precision="bf16"), groups.tensor)
    return {parameter.name: tensor.dtype for parameter, tensor in model.global_parameters()}
