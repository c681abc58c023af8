"""From a config to this rank's model, its data-parallel wrapping and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from parallel_clip.config import Config
from parallel_clip.convert.names import Parameter
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.loss.contrastive import ContrastiveLoss
from parallel_clip.model.architectures import Architecture
from parallel_clip.model.clip import CLIPModel, ModelOptions, global_parameters
from parallel_clip.pipeline.partition import Stage, chunks_of, partition
from parallel_clip.training.optimizer import (
    DistributedDataParallel,
    Optimizer,
    wrap_for_data_parallel,
)


@dataclass(frozen=True)
class Built:
    """A rank's slice of the model, wrapped, with its optimizer. Weights are not set yet.

    chunks: the stages that this rank holds, in order: one, or several virtual ones.
    """

    chunks: list[CLIPModel]
    wrapped: list[DistributedDataParallel]
    optimizer: Optimizer

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        return global_parameters(self.chunks)


def build_loss(config: Config, groups: Groups, stages_help: bool) -> ContrastiveLoss:
    """The loss over the data-parallel ranks, its work split over the tensor-parallel ones, and over
    the stages of the pipeline if they help."""
    kind = {"infonce": ClipLoss, "sigmoid": SigLipLoss}[config.loss.kind]
    settings = config.loss
    return kind(
        group=groups.data,
        helpers=groups.model if stages_help else groups.tensor,
        exchange=settings.exchange,
        tile=settings.tile,
    )


def stages_of(config: Config, architecture: Architecture, layout: Layout) -> tuple[Stage, ...]:
    """The layers of each stage, in the order in which data pass through them."""
    return partition(architecture, layout.pipeline, layout.virtual_pipeline, config.parallel.stages)


def build(config: Config, architecture: Architecture, groups: Groups) -> Built:
    options = ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=config.parallel.sequence,
        deterministic=config.deterministic,
    )
    layout = groups.layout
    stages = stages_of(config, architecture, layout)
    with groups.device:
        chunks = [
            CLIPModel(architecture, options, groups.tensor, stages, stage.number)
            for stage in chunks_of(stages, layout.pipeline, groups.pipeline_rank)
        ]
    # With one data-parallel rank there is nothing to split, only copies to make.
    split_state = config.parallel.distributed_optimizer and layout.data > 1
    wrapped = wrap_for_data_parallel(chunks, split_state)
    return Built(chunks, wrapped, Optimizer(wrapped, config))
