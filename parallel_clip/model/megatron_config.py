"""The one writer of megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import ACTIVATIONS
from parallel_clip.model.towers.text import TextConfig
from parallel_clip.model.towers.vision import VisionConfig

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


def _tower_config(
    tower: VisionConfig | TextConfig,
    layers: int,
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
        num_layers=layers,
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
    config = TransformerConfig(
        num_layers=1,
        hidden_size=tensor_group.size(),
        num_attention_heads=tensor_group.size(),
        **_parallel_settings(options, tensor_group),
    )
    config.hidden_size = 1  # a message is one column of numbers, see handover.py
    config.deallocate_pipeline_outputs = True  # what has been sent is not needed for backward
    return config


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
