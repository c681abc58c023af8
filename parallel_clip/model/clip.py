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

from parallel_clip.model.architecture import Architecture
from parallel_clip.model.handover import Handover, handover, message_length
from parallel_clip.model.megatron_config import ModelOptions, _schedule_config, _tower_config
from parallel_clip.model.parameters import Parameter, parameter_table
from parallel_clip.model.towers.text import TextTower
from parallel_clip.model.towers.vision import VisionTower
from parallel_clip.stages.partition import whole_model
from parallel_clip.stages.stage import LayerRange, Stage

_LAYER = re.compile(r"(vision|text)\.block\.layers\.(\d+)\.(.+)")


class CLIPModel(MegatronModule):
    """A rank's slice of one stage of both towers; of the whole of them where there is one stage.

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
        stages: Sequence[Stage] | None = None,
        number: int = 0,
    ):
        super().__init__(_schedule_config(options, tensor_group))
        self.architecture = architecture
        self.tensor_group = tensor_group
        self.stages = stages or [whole_model(architecture)]
        self.stage = self.stages[number]
        self.received: Tensor | None = None
        self.vision = self._build_tower(
            VisionTower, architecture.vision, self.stage.vision, options
        )
        self.text = self._build_tower(TextTower, architecture.text, self.stage.text, options)
        self.logit_scale = self.logit_bias = None
        if self.stage.is_last:
            self.logit_scale = nn.Parameter(torch.empty(()))
            if architecture.init_logit_bias is not None:
                self.logit_bias = nn.Parameter(torch.empty(()))
        for parameter, tensor in self.global_parameters():
            # The gradient norm counts a split tensor on every rank and a whole one on the first.
            tensor.tensor_model_parallel = parameter.placement.axis is not None

    def _build_tower(self, kind, tower, held: LayerRange, options: ModelOptions):
        if held.layers == 0:
            return None
        config = _tower_config(tower, held.layers, options, self.tensor_group)
        return kind(tower, self.architecture.embed_dim, config, self.tensor_group, held)

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
            before = self.stages[self.stage.number - 1]
            vision, text = self.handover(before, pairs).unpack(self.pop_input_tensor())
        vision = self.forward_vision(vision, kept)
        text = self.forward_text(text, tokens)
        if self.stage.is_last:
            return torch.stack([normalised(vision), normalised(text)])
        handed_on = self.handover(self.stage, pairs)
        return handed_on.pack(vision, text, self.message_length(pairs))

    def forward_vision(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Pictures or hidden states through this stage's layers; to features where they end."""
        return x if self.vision is None else self.vision(x, kept)

    def forward_text(self, x: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Likewise for texts; None before the first of their layers."""
        return x if self.text is None else self.text(x, tokens)

    def handover(self, stage: Stage, pairs: int) -> Handover:
        """What `stage` of this pipeline hands on for a microbatch of `pairs`."""
        vision = self.architecture.vision
        return handover(
            stage,
            self.architecture,
            pairs,
            1 + vision.patches_kept if self.training else vision.tokens,
            self.tensor_group.size(),
            self.config.sequence_parallel,
        )

    def message_length(self, pairs: int) -> int:
        """The numbers in each message of this pipeline for a microbatch of `pairs`."""
        return message_length([self.handover(stage, pairs) for stage in self.stages[:-1]])

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        """What each of this rank's tensors is a slice of."""
        held = dict(self.named_parameters())
        table = [(p, self._own_name(p.module)) for p in parameter_table(self.architecture)]
        return [(p, held[name]) for p, name in table if name in held]

    def _own_name(self, module: str) -> str:
        """A module's name here, where layers are counted from this stage's first."""
        block = _LAYER.fullmatch(module)
        if block is None:
            return module
        tower, layer, rest = block.groups()
        held = self.stage.vision if tower == "vision" else self.stage.text
        return f"{tower}.block.layers.{int(layer) - held.first}.{rest}"

    # The schedules of megatron-core ask these of a model.
    model_type = ModelType.encoder_or_decoder
    pre_process = post_process = True
    share_embeddings_and_output_weights = False

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the stage before hands on: one message, None on the first stage."""
        (self.received,) = input_tensor

    def pop_input_tensor(self) -> Tensor | None:
        """The message that has come. It is not kept here: whoever needs it for backward has it."""
        received, self.received = self.received, None
        return received


def global_parameters(chunks: Sequence[CLIPModel]) -> list[tuple[Parameter, nn.Parameter]]:
    """What each tensor of a rank that holds these stages is a slice of."""
    return [found for chunk in chunks for found in chunk.global_parameters()]


def normalised(features: Tensor) -> Tensor:
    """[b, D] -> fp32 [b, D] of length 1."""
    return F.normalize(features.float(), dim=-1)


def clamp_logit_scale(model: CLIPModel) -> None:
    """Keep the multiplier within [1, 100], as OpenCLIP does after each step."""
    if model.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
