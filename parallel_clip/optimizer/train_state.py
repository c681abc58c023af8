"""A rank's model chunks, their data-parallel wrapping and their optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from parallel_clip.config import Config
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout, microbatch_group_size
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel, global_parameters
from parallel_clip.model.megatron_config import ModelOptions, set_gradient_hooks
from parallel_clip.model.parameters import Parameter
from parallel_clip.optimizer.adamw import Optimizer
from parallel_clip.stages.partition import chunks_of, partition
from parallel_clip.stages.stage import Stage


def wrap_for_data_parallel(
    chunks: Sequence[CLIPModel], distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """megatron-core's DDP around each stage of a rank: gradients are accumulated and reduced in
    fp32, while backward runs."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        use_distributed_optimizer=distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    set_gradient_hooks(wrapped)
    return wrapped


@dataclass(frozen=True)
class TrainState:
    """A rank's slice of the model, wrapped, with its optimizer. Weights are not set yet.

    chunks: the stages that this rank holds, in order: one, or several virtual ones.
    """

    chunks: list[CLIPModel]
    wrapped: list[DistributedDataParallel]
    optimizer: Optimizer

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        return global_parameters(self.chunks)


def stages_of(config: Config, architecture: Architecture, layout: Layout) -> tuple[Stage, ...]:
    """The layers of each stage, in the order in which data pass through them."""
    return partition(
        architecture.costs, layout.pipeline, layout.virtual_pipeline, config.parallel.stages
    )


def build_train_state(config: Config, architecture: Architecture, groups: Groups) -> TrainState:
    layout = groups.layout
    group = None
    if layout.virtual_pipeline > 1:
        microbatches = config.batch.global_ // (config.batch.micro * layout.data)
        group = microbatch_group_size(microbatches, layout.pipeline)
    options = ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=config.parallel.sequence,
        deterministic=config.deterministic,
        virtual_pipeline=layout.virtual_pipeline,
        microbatch_group=group,
    )
    stages = stages_of(config, architecture, layout)
    with groups.device:
        chunks = [
            CLIPModel(architecture, options, groups.tensor, stages, stage.number)
            for stage in chunks_of(stages, layout.pipeline, groups.pipeline_rank)
        ]
    # With one data-parallel rank there is nothing to split, only copies to make.
    split_state = config.parallel.distributed_optimizer and layout.data > 1
    wrapped = wrap_for_data_parallel(chunks, split_state)
    return TrainState(chunks, wrapped, Optimizer(wrapped, config))
