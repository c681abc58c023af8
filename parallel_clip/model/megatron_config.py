"""The one writer of megatron-core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from torch.distributed import ProcessGroup

from parallel_clip.model.layers import ACTIVATIONS
from parallel_clip.model.towers.transformer import TowerConfig
from parallel_clip.stages.costs import units_per_rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run, apart from what it is.

    sequence: sequence parallelism; recompute: none, selective or full; deterministic: on GPU, only
    kernels that give the same bits each time; virtual_pipeline: stages on each pipeline rank;
    microbatch_group: how many microbatches go through one of them before the next one's turn, where
    there are several (`pipeline.orders.microbatch_group_size`); captions: texts of each picture in
    training.
    """

    precision: str = "fp32"
    recompute: str = "none"
    sequence: bool = False
    deterministic: bool = False
    virtual_pipeline: int = 1
    microbatch_group: int | None = None
    captions: int = 1


def tower_config(
    tower: TowerConfig, layers: int, options: ModelOptions, tensor_group: ProcessGroup
) -> TransformerConfig:
    """The config of `layers` blocks of a tower; heads and MLP are padded where the tensor size does
    not divide them (`Placement`)."""
    full = options.recompute == "full"
    tensor = tensor_group.size()
    return TransformerConfig(
        num_layers=layers,
        hidden_size=tower.width,
        num_attention_heads=tensor * units_per_rank(tower.heads, tensor),
        kv_channels=tower.head_width,
        ffn_hidden_size=tensor * units_per_rank(tower.mlp_width, tensor),
        layernorm_epsilon=tower.norm_eps,
        activation_func=ACTIVATIONS[tower.activation],
        recompute_granularity=None if options.recompute == "none" else options.recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        **_parallel_settings(options, tensor_group),
    )


def schedule_config(options: ModelOptions, tensor_group: ProcessGroup) -> TransformerConfig:
    """What megatron-core's schedules and DDP read of a model; the layers have configs of their own.

    Complete but for `set_gradient_hooks`, which needs the DDP wrapping.
    """
    config = TransformerConfig(
        num_layers=1,
        hidden_size=tensor_group.size(),
        num_attention_heads=tensor_group.size(),
        **_parallel_settings(options, tensor_group),
    )
    config.hidden_size = 1  # a message is one column of numbers, see handover.py
    config.deallocate_pipeline_outputs = True  # what has been sent is not needed for backward
    config.batch_p2p_sync = False  # it waits for the device at every message, for torch of 2022
    if options.virtual_pipeline > 1:
        # Over gloo, batched messages of several chunks mix up.
        config.batch_p2p_comm = dist.get_backend(tensor_group) != "gloo"
        config.virtual_pipeline_model_parallel_size = options.virtual_pipeline
        config.microbatch_group_size_per_vp_stage = options.microbatch_group
    return config


def set_gradient_hooks(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Tell the schedule of a rank's chunks how DDP holds back the reduction of gradients until the
    last microbatch, and how gradients are finished after it."""
    no_sync = [ddp.no_sync for ddp in wrapped]
    for ddp in wrapped:
        ddp.module.config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        ddp.module.config.finalize_model_grads_func = finalize_model_grads


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
