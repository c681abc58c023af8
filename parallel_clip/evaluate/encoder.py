"""Our own model as an encoder: a checkpoint of any kind, or the model that is being trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_clip.convert.source import ModelWeights, open_source
from parallel_clip.data.tokenizer import Tokenizer, build_tokenizer
from parallel_clip.data.transforms import Preprocess
from parallel_clip.engine.groups import Groups, open_groups
from parallel_clip.engine.launch import read_launch
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout, check_model
from parallel_clip.model.architectures import Architecture, load_architecture
from parallel_clip.model.clip import CLIPModel, ModelOptions
from parallel_clip.model.initialize import load_slice


@dataclass(frozen=True)
class ModelEncoder:
    """See `encoder_protocol.Encoder`."""

    model: CLIPModel
    preprocess: Preprocess
    tokenizer: Tokenizer
    device: torch.device

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def encode_image(self, images: Tensor) -> Tensor:
        with self._evaluating():
            return self.model.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        with self._evaluating():
            return self.model.encode_text(tokens)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without gradients and without patch dropout; afterwards the model is as it was."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def load_encoder(
    checkpoint: str,
    groups: Groups | None = None,
    *,
    model_name: str | None = None,
    tokenizer: str | None = None,
    precision: str = "fp32",
) -> ModelEncoder:
    """Load a run, a checkpoint or an OpenCLIP file or folder; every tensor rank its slice.

    groups: who shares the model; None: this process alone. model_name: needed where the checkpoint
    does not say what it is (a bare OpenCLIP state dict). tokenizer: as `data.tokenizer`.

    Raises:
        InputError: no checkpoint, one of another architecture, or no tokenizer at hand.
    """
    source = open_source(checkpoint)
    facts = source.facts
    architecture = load_architecture(model_name) if model_name else facts.architecture
    if architecture is None:
        raise InputError(
            f"{checkpoint} does not say which model it is (no open_clip_config.json beside it); "
            "add --model NAME"
        )
    weights = ModelWeights(source, architecture)
    preprocess = Preprocess.from_openclip(architecture.vision.image_size, facts.preprocess)
    tokenize = build_tokenizer(tokenizer or facts.tokenizer, architecture.text, facts.folder)
    if groups is None:
        groups = open_groups(Layout(1), read_launch({}))
    check_model(groups.layout.tensor, architecture)

    with groups.device:
        options = ModelOptions(precision=precision, sequence=groups.layout.sequence)
        model = CLIPModel(architecture, options, groups.tensor)
    for parameter, tensor in model.global_parameters():
        load_slice(tensor, parameter, weights.read(parameter.name), groups.tensor)
    return ModelEncoder(model.eval(), preprocess, tokenize, groups.device)
