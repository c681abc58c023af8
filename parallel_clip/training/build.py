"""From a config to this rank's model, its data-parallel wrapping and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_clip.config import Config
from parallel_clip.engine.groups import Groups
from parallel_clip.model.architectures import Architecture
from parallel_clip.model.clip import CLIPModel, ModelOptions
from parallel_clip.training.optimizer import (
    DistributedDataParallel,
    Optimizer,
    wrap_for_data_parallel,
)


@dataclass(frozen=True)
class Built:
    """A rank's slice of the model, wrapped, with its optimizer. Weights are not set yet."""

    model: CLIPModel
    ddp: DistributedDataParallel
    optimizer: Optimizer


def build(config: Config, architecture: Architecture, groups: Groups) -> Built:
    options = ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=config.parallel.sequence,
        deterministic=config.deterministic,
    )
    with groups.device:
        model = CLIPModel(architecture, options, groups.tensor)
    # With one data-parallel rank there is nothing to split, only copies to make.
    split_state = config.parallel.distributed_optimizer and groups.layout.data > 1
    ddp = wrap_for_data_parallel(model, split_state)
    return Built(model, ddp, Optimizer(ddp, config))
