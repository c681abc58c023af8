"""Both towers and the logit scale: the model that a rank holds its slice of, stage by stage."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.model.architecture import Architecture, parameter_table
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

    stages: all stages of the pipeline; `number`: the one that this is.
    """

    def __init__(
        self,
        architecture: Architecture,
        options: ModelOptions,
        tensor_group: ProcessGroup,
        stages: Sequence[Stage],
        number: int = 0,
    ):
        super().__init__(schedule_config(options, tensor_group))
        self.architecture = architecture
        self.tensor_group = tensor_group
        self.stages = tuple(stages)
        self.stage = self.stages[number]
        sequence_ranks = tensor_group.size() if self.config.sequence_parallel else 1
        self.messages = MessageLayout(architecture, self.stages, sequence_ranks)
        self.input_tensor: Tensor | None = None  # come, and not yet taken by a forward
        self.vision = self._build_tower(architecture.vision, self.stage.vision, options)
        self.text = self._build_tower(architecture.text, self.stage.text, options)
        self.logit_scale = self.logit_bias = None
        if self.stage.is_last:
            self.logit_scale = nn.Parameter(torch.empty(()))
            if architecture.init_logit_bias is not None:
                self.logit_bias = nn.Parameter(torch.empty(()))
        for parameter, tensor in self.global_parameters():
            # The gradient norm counts a split tensor on every rank and a whole one on the first.
            tensor.tensor_model_parallel = parameter.placement.axis is not None

    def _build_tower(
        self, tower: TowerConfig, layer_range: LayerRange, options: ModelOptions
    ) -> nn.Module | None:
        if layer_range.layers == 0:
            return None
        config = tower_config(tower, layer_range.layers, options, self.tensor_group)
        embed_dim = self.architecture.embed_dim
        return tower.module_class(tower, embed_dim, config, self.tensor_group, layer_range)

    def forward(self, images: Tensor | None, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """One microbatch through this stage.

        images: fp32 [b, 3, height, width], on the first stage alone; tokens: int64
        [b, context_length]; kept: the patches to keep, int64 [b, k], or None for all, where the
        pictures are. What the stage before handed on has come by `set_input_tensor`.
        Returns what is handed on (see handover.py), and on the last stage the normalised features
        of both towers, pictures first: fp32 [2, b, D].
        """
        pairs = len(tokens)
        vision, text = images, None
        if not self.stage.is_first:
            before = self.messages.of(self.stages[self.stage.number - 1], pairs, self.training)
            vision, text = before.unpack(self.pop_input_tensor())
        vision = self.forward_vision(vision, kept)
        text = self.forward_text(text, tokens)
        if self.stage.is_last:
            return torch.stack([normalised(vision), normalised(text)])
        handed_on = self.messages.of(self.stage, pairs, self.training)
        return handed_on.pack(vision, text, self.messages.length(pairs, self.training))

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
        """A module's name here, where layers are counted from this stage's first."""
        block = _LAYER.fullmatch(module)
        if block is None:
            return module
        tower, layer, rest = block.groups()
        layer_range = self.stage.vision if tower == "vision" else self.stage.text
        return f"{tower}.block.layers.{int(layer) - layer_range.first}.{rest}"

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
