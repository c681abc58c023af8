"""The encoder interface of all evaluations, and our model behind it: loaded, or in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_clip.convert.choose_model import ModelChoice
from parallel_clip.convert.open import open_model
from parallel_clip.data.samples.tokenizer import Tokenizer, build_tokenizer
from parallel_clip.data.samples.transforms import Preprocess, normalize
from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.engine.device import keep_random_state
from parallel_clip.engine.groups import Groups, whole_model_groups
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel, global_parameters, normalised
from parallel_clip.model.handover import Handover, Shape
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.model.parameters import load_slice
from parallel_clip.stages.padding import padding_words
from parallel_clip.stages.stage import whole_model


class Encoder(Protocol):
    """Both towers, with their preprocessing and tokenizer.

    All ranks that share a model call its methods together, with the same arguments. In a pipeline
    `encode_*` returns the features on the last stage alone, and zeros on the others, which go on to
    the next batch; `broadcast_from_last_stage` gives them to all once everything is encoded.
    """

    architecture: Architecture
    preprocess: Preprocess
    tokenizer: Tokenizer
    device: torch.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Images fp32 [n, 3, H, W] to normalised features fp32 [n, D]; both on `device`."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [n, L] to normalised features fp32 [n, D]; both on `device`."""

    def broadcast_from_last_stage(self, values: Tensor) -> Tensor:
        """The last stage's `values` on every rank of the model; of one shape on all stages."""


def encode_pictures(encoder: Encoder, pictures: Tensor) -> Tensor:
    """uint8 [n, 3, H, W] on the CPU to normalised features fp32 [n, D] on the encoder's device.

    They travel as bytes, a fourth of what they are once normalized."""
    return encoder.encode_image(normalize(pictures.to(encoder.device), encoder.preprocess))


@dataclass(frozen=True)
class ModelEncoder:
    """Our own model as an `Encoder`. chunks: the pipeline stages that this rank holds."""

    chunks: Sequence[CLIPModel]
    preprocess: Preprocess
    tokenizer: Tokenizer
    groups: Groups

    @property
    def architecture(self) -> Architecture:
        return self.chunks[0].architecture

    @property
    def device(self) -> torch.device:
        return self.groups.device

    def encode_image(self, images: Tensor) -> Tensor:
        return self._through_stages(
            len(images),
            lambda handover: handover.vision,
            lambda chunk, x: chunk.forward_vision(images if chunk.stage.is_first else x),
        )

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._through_stages(
            len(tokens),
            lambda handover: handover.text,
            lambda chunk, x: chunk.forward_text(x, tokens),
        )

    def broadcast_from_last_stage(self, values: Tensor) -> Tensor:
        return broadcast_from_last_stage(values, self.groups.pipeline)

    def _through_stages(
        self,
        count: int,
        part: Callable[[Handover], Shape | None],
        advance: Callable[[CLIPModel, Tensor | None], Tensor | None],
    ) -> Tensor:
        """Run one tower's forward pass through this rank's stages, receiving and sending between.

        part: the tower's shape in a message; advance: its layers on a stage. A rank returns once it
        has sent, so that the next batch can enter the pipeline behind this one.
        """
        group = self.groups.pipeline

        def neighbour(step: int) -> int:
            return dist.get_global_rank(group, (group.rank() + step) % group.size())

        with self._evaluating():
            for chunk in self.chunks:
                stage, x, shape = chunk.stage, None, None
                if not stage.is_first:
                    before = chunk.stages[stage.number - 1]
                    shape = part(chunk.messages.of(before, count, chunk.training))
                if shape is not None:
                    x = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=self.device)
                    dist.recv(x, neighbour(-1), group=group)
                x = advance(chunk, x)
                if stage.is_last:
                    return normalised(x)
                if x is not None:
                    dist.send(x.contiguous(), neighbour(1), group=group)
        return torch.zeros(count, self.architecture.embed_dim, device=self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode (no gradients, no patch dropout) inside; the mode before it after."""
        was_training = self.chunks[0].training
        for chunk in self.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in self.chunks:
                chunk.train(was_training)


def load_encoder(
    checkpoint: str | Path,
    groups: Groups | None = None,
    *,
    model_name: str | None = None,
    override: Sequence[str] = (),
    tokenizer: str | None = None,
    precision: str = "fp32",
    ema: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> ModelEncoder:
    """Load a checkpoint of any format, without pipeline stages; every tensor rank its slice. Where
    the tensor size does not divide the model it is padded.

    checkpoint: as in `open_source`. groups: None for a whole model in this process. model_name:
    needed where the checkpoint does not say which model it is (a bare OpenCLIP state dict);
    override: the switches in which it may differ from what the checkpoint says. tokenizer: as
    `data.tokenizer`. precision: fp32 or bf16. ema: the averages of its weights (`ema.decay`). say:
    told what is used, and where that is from.

    Raises:
        InputError: no checkpoint, one of another architecture, without averages or with weights
            that are not finite, or no tokenizer at hand.
    """
    groups = groups or whole_model_groups()
    choice = ModelChoice(model_name, override, tokenizer_chosen=tokenizer is not None)
    # Verified once is enough.
    opened = open_model(checkpoint, choice, verify=groups.is_rank_zero, averages=ema)
    architecture, metadata = opened.architecture, opened.source.metadata
    for note in opened.notes:
        say(note)
    padding = padding_words(architecture.costs, groups.layout.tensor)
    if padding is not None:
        say(f"padding for {groups.layout.tensor} tensor ranks: {padding}")
    tokenize = build_tokenizer(tokenizer or metadata.tokenizer, architecture.text, metadata.folder)

    with groups.device, keep_random_state():  # nothing that is drawn here stays
        options = ModelOptions(precision=precision, sequence=groups.layout.sequence)
        whole = whole_model(architecture.vision.layers, architecture.text.layers)
        model = CLIPModel(architecture, options, groups.tensor, [whole])
    for parameter, tensor in global_parameters([model]):
        load_slice(tensor, parameter, opened.weights.read(parameter.name), groups.tensor)
    return ModelEncoder([model.eval()], opened.preprocess, tokenize, groups)
