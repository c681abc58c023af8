"""Both towers and the logit scale: the model that a rank holds its slice of, stage by stage."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.frozen import NOTHING_FROZEN, FrozenParts, FrozenTower
from parallel_clip.model.handover import MessageLayout
from parallel_clip.model.megatron_config import ModelOptions, schedule_config, tower_config
from parallel_clip.model.parameters import Parameter
from parallel_clip.model.towers.transformer import TowerConfig
from parallel_clip.stages.stage import LayerRange, Stage

_LAYER = re.compile(r"(vision|text)\.block\.layers\.(\d+)\.(.+)")


class CLIPModel(MegatronModule):
    """A rank's slice of one stage of both towers.

    The towers are in `options.precision`; `logit_scale` (the logarithm of the multiplier) and
    `logit_bias` are fp32 always, since bf16 would put the multiplier off by up to 1%. They belong
    to the last stage, where the loss is; elsewhere they are None.

    stages: all stages of the pipeline; `number`: the one that this is; frozen: what is not trained.
    """

    def __init__(
        self,
        architecture: Architecture,
        options: ModelOptions,
        tensor_group: ProcessGroup,
        stages: Sequence[Stage],
        number: int = 0,
        frozen: FrozenParts = NOTHING_FROZEN,
    ):
        super().__init__(schedule_config(options, tensor_group))
        self.architecture = architecture
        self.tensor_group = tensor_group
        self.stages = tuple(stages)
        self.stage = self.stages[number]
        self.frozen = frozen
        sequence_ranks = tensor_group.size() if self.config.sequence_parallel else 1
        self.captions = options.captions
        self.messages = MessageLayout(architecture, self.stages, sequence_ranks, self.captions)
        self.input_tensor: Tensor | None = None  # come, and not yet taken by a forward
        self.vision = self._build_tower(
            architecture.vision, self.stage.vision, frozen.vision, options
        )
        self.text = self._build_tower(architecture.text, self.stage.text, frozen.text, options)
        self.logit_scale = self.logit_bias = None
        if self.stage.is_last:
            self.logit_scale = nn.Parameter(torch.empty(()))
            if architecture.init_logit_bias is not None:
                self.logit_bias = nn.Parameter(torch.empty(()))
        for parameter, tensor in self.global_parameters():
            # The gradient norm counts a split tensor on every rank and a whole one on the first.
            tensor.tensor_model_parallel = parameter.placement.axis is not None
            tensor.requires_grad_(parameter.name not in frozen.names)

    def _build_tower(
        self,
        tower: TowerConfig,
        layer_range: LayerRange,
        frozen: FrozenTower,
        options: ModelOptions,
    ) -> nn.Module | None:
        if layer_range.layers == 0:
            return None
        config = tower_config(tower, layer_range.layers, options, self.tensor_group)
        embed_dim, leading = self.architecture.embed_dim, frozen.leading_layers(layer_range)
        group = self.tensor_group
        return tower.module_class(tower, embed_dim, config, group, layer_range, leading)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        kept: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        """One microbatch through this stage.

        images: fp32 [b, 3, height, width], on the first stage alone; tokens: int64
        [b · captions, context_length], the texts of a picture in a row; kept: the patches to keep,
        int64 [b, k], or None for all, where the pictures are; again: given where the microbatch has
        been through before in this step. What the stage before handed on has come by
        `set_input_tensor`.
        Returns what is handed on (see handover.py), and on the last stage the normalised features
        of both towers, pictures first: fp32 [b + b · captions, D].
        """
        pairs, message = len(tokens) // self.captions, None
        vision, text = images, None
        if not self.stage.is_first:
            before = self.messages.of(self.stages[self.stage.number - 1], pairs, self.training)
            message = self.pop_input_tensor()
            vision, text = before.unpack(message)
            if not self.frozen.vision.wants_gradient_before(self.stage.vision):
                vision = vision.detach()
            if text is not None and not self.frozen.text.wants_gradient_before(self.stage.text):
                text = text.detach()
        # A tower that is frozen whole would make the same features again.
        skip_vision = again is not None and self.frozen.vision.whole
        skip_text = again is not None and self.frozen.text.whole
        vision = None if skip_vision else self.forward_vision(vision, kept)
        text = None if skip_text else self.forward_text(text, tokens)
        if self.stage.is_last:
            result = torch.cat(
                [
                    again.features[:pairs] if skip_vision else normalised(vision),
                    again.features[pairs:] if skip_text else normalised(text),
                ]
            )
        else:
            handed_on = self.messages.of(self.stage, pairs, self.training)
            length = self.messages.length(pairs, self.training)
            empty = None
            if skip_vision or skip_text:
                empty = torch.empty(0, dtype=self.config.pipeline_dtype, device=tokens.device)
            result = handed_on.pack(vision, text, length, empty)
        virtual = self.config.virtual_pipeline_model_parallel_size is not None
        if virtual and message is not None and not self.wants_gradient(self.stage):
            # The interleaved schedule sends the gradient of every message (see communicator.py).
            result = _ZeroGradient.apply(result, message)
        return result

    def wants_gradient(self, stage: Stage) -> bool:
        """Whether anything in front of a stage is trained, so that what comes to it has a
        gradient."""
        vision, text = self.frozen.vision, self.frozen.text
        return vision.wants_gradient_before(stage.vision) or text.wants_gradient_before(stage.text)

    def forward_vision(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Images or hidden states [S, b, h] through this stage's layers: hidden states, or features
        [b, D] where the tower ends; x itself where the stage holds no layer of it."""
        return x if self.vision is None else self.vision(x, kept)

    def forward_text(self, x: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Likewise for texts; None before the stage that holds their embedding."""
        return x if self.text is None else self.text(x, tokens)

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        """This rank's tensors, each with the parameter that it is a slice of."""
        tensors = dict(self.named_parameters())
        table = [(p, self._own_name(p.module)) for p in parameter_table(self.architecture)]
        return [(p, tensors[name]) for p, name in table if name in tensors]

    def _own_name(self, module: str) -> str:
        """A module's name here, where layers are counted from this stage's first, and those before
        all that is trained have a block of their own."""
        block = _LAYER.fullmatch(module)
        if block is None:
            return module
        tower, layer, rest = block.groups()
        held = getattr(self.stage, tower)
        leading, number = getattr(self.frozen, tower).leading_layers(held), int(layer) - held.first
        if number < leading:
            return f"{tower}.frozen_block.layers.{number}.{rest}"
        return f"{tower}.block.layers.{number - leading}.{rest}"

    # The schedules of megatron-core ask these of a model.
    model_type = ModelType.encoder_or_decoder
    pre_process = post_process = True
    share_embeddings_and_output_weights = False

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the stage before hands on: one message, None on the first stage."""
        (self.input_tensor,) = input_tensor

    def pop_input_tensor(self) -> Tensor | None:
        """Take the message that has come. It is not kept here: autograd keeps what it needs."""
        message, self.input_tensor = self.input_tensor, None
        return message


class Again(NamedTuple):
    """That a microbatch goes through a stage for the second time in a step. features: what the last
    stage returned the first time; None on the others."""

    features: Tensor | None = None


class _ZeroGradient(torch.autograd.Function):
    """`result` itself, with a gradient of zero for a message that nothing in it depends on."""

    @staticmethod
    def forward(ctx, result: Tensor, message: Tensor) -> Tensor:
        ctx.like = torch.empty_like(message, device="meta")
        ctx.device = message.device
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.like, device=ctx.device)


def global_parameters(chunks: Sequence[CLIPModel]) -> list[tuple[Parameter, nn.Parameter]]:
    """The tensors of all of a rank's chunks, each with the parameter that it is a slice of."""
    return [found for chunk in chunks for found in chunk.global_parameters()]


def normalised(features: Tensor) -> Tensor:
    """[b, D] -> fp32 [b, D] of length 1."""
    return F.normalize(features.float(), dim=-1)


def clamp_logit_scale(model: CLIPModel) -> None:
    """Keep the multiplier within [1, 100], as OpenCLIP does after each step."""
    if model.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
