"""Both towers and the logit scale: the model that a rank holds its slice of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.convert.names import Parameter, parameter_table
from parallel_clip.model.architectures import Architecture, TextArchitecture, VisionArchitecture
from parallel_clip.model.layers import ACTIVATIONS
from parallel_clip.model.text import TextTower
from parallel_clip.model.vision import VisionTower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run, apart from what it is.

    sequence: sequence parallelism; recompute: none, selective or full; deterministic: on GPU,
    only kernels that give the same bits each time.
    """

    precision: str = "fp32"
    recompute: str = "none"
    sequence: bool = False
    deterministic: bool = False


class CLIPModel(MegatronModule):
    """A rank's slice of both towers.

    The towers are in `options.precision`; `logit_scale` (the logarithm of the multiplier) and
    `logit_bias` are fp32 always, since bf16 would put the multiplier off by up to 1%.
    """

    def __init__(
        self, architecture: Architecture, options: ModelOptions, tensor_group: ProcessGroup
    ):
        super().__init__(_schedule_config(options, tensor_group))
        self.architecture = architecture
        self.tensor_group = tensor_group
        self.vision = VisionTower(
            architecture.vision,
            architecture.embed_dim,
            _tower_config(architecture.vision, options, tensor_group),
            tensor_group,
        )
        self.text = TextTower(
            architecture.text,
            architecture.embed_dim,
            _tower_config(architecture.text, options, tensor_group),
            tensor_group,
        )
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None
        if architecture.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.empty(()))
        for parameter, tensor in self.global_parameters():
            # The gradient norm counts a split tensor on every rank and a whole one on the first.
            tensor.tensor_model_parallel = parameter.placement.axis is not None

    def forward(self, images: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised features of both towers: fp32 [2, b, D], pictures first.

        images: fp32 [b, 3, height, width]; tokens: int64 [b, context_length]; kept: the patches to
        keep, int64 [b, k], or None for all.
        """
        return torch.stack([self.encode_image(images, kept), self.encode_text(tokens)])

    def encode_image(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised features: fp32 [b, D]."""
        return F.normalize(self.vision(images, kept).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Normalised features: fp32 [b, D]."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        """What each of this rank's tensors is a slice of."""
        held = dict(self.named_parameters())
        return [(p, held[p.module]) for p in parameter_table(self.architecture)]

    # The schedules of megatron-core ask these of a model.
    model_type = ModelType.encoder_or_decoder
    pre_process = post_process = True
    share_embeddings_and_output_weights = False

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """What the stage before hands on; there is none."""


def clamp_logit_scale(model: CLIPModel) -> None:
    """Keep the multiplier within [1, 100], as OpenCLIP does after each step."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))


def _tower_config(
    tower: VisionArchitecture | TextArchitecture,
    options: ModelOptions,
    tensor_group: ProcessGroup,
) -> TransformerConfig:
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[options.recompute]
    return TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.width,
        num_attention_heads=tower.heads,
        ffn_hidden_size=tower.mlp_width,
        layernorm_epsilon=tower.norm_eps,
        activation_func=ACTIVATIONS[tower.activation],
        **_parallel_settings(options, tensor_group),
        **recompute,
    )


def _schedule_config(options: ModelOptions, tensor_group: ProcessGroup) -> TransformerConfig:
    """What megatron-core's schedules and DDP read; the layers have configs of their own."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=tensor_group.size(),
        num_attention_heads=tensor_group.size(),
        **_parallel_settings(options, tensor_group),
    )


def _parallel_settings(options: ModelOptions, tensor_group: ProcessGroup) -> dict:
    dtype = DTYPES[options.precision]
    return {
        "tensor_model_parallel_size": tensor_group.size(),
        "sequence_parallel": options.sequence and tensor_group.size() > 1,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "deterministic_mode": options.deterministic,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "perform_initialization": False,  # initialize.py does, from global names
    }
