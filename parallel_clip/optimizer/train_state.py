"""A rank's model chunks, their data-parallel wrapping, their optimizer and their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn

from parallel_clip.config import Ema as EmaSettings
from parallel_clip.config import Optimizer as OptimizerSettings
from parallel_clip.engine.groups import Groups
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel, global_parameters
from parallel_clip.model.frozen import NOTHING_FROZEN, FrozenParts
from parallel_clip.model.megatron_config import ModelOptions, set_gradient_hooks
from parallel_clip.model.parameters import Parameter
from parallel_clip.optimizer.adamw import MegatronAdamW
from parallel_clip.optimizer.average import WeightAverage
from parallel_clip.optimizer.frozen_weights import FrozenWeights
from parallel_clip.stages.partition import chunks_of
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
    """A rank's slice of the model, wrapped for data parallelism, with its optimizer.

    When it is built its weights are not set yet: by `set_weight` and then `average.start`, or from
    a checkpoint. chunks: the stages that this rank holds, in order: one, or several virtual ones;
    frozen_weights: the fp32 values of tensors that are frozen and rounded; average: of the weights
    that are trained, None where none is kept.
    """

    chunks: list[CLIPModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronAdamW
    frozen_weights: FrozenWeights
    average: WeightAverage | None = None

    def global_parameters(self) -> list[tuple[Parameter, nn.Parameter]]:
        """Each tensor of the rank with the parameter that it is a slice of."""
        return global_parameters(self.chunks)

    def set_weight(self, tensor: nn.Parameter, value: Tensor) -> None:
        """Set a tensor and its fp32 value, wherever that is. `value`: fp32, of its shape."""
        if tensor.requires_grad:
            self.optimizer.set_weight(tensor, value)
        else:
            self.frozen_weights.set(tensor, value)


def build_train_state(
    architecture: Architecture,
    options: ModelOptions,
    stages: Sequence[Stage],
    groups: Groups,
    settings: OptimizerSettings,
    distributed_optimizer: bool = True,
    frozen: FrozenParts = NOTHING_FROZEN,
    trained_since: Mapping[str, int] | None = None,
    ema: EmaSettings = EmaSettings(),  # noqa: B008  (it is frozen)
) -> TrainState:
    """Build this rank's stages on its device, wrap them, and make their optimizer.

    stages: all of the pipeline, in the order in which data pass through them;
    distributed_optimizer: split masters, moments and averages over the data ranks (ZeRO-1); frozen:
    what is not trained; trained_since: after how many updates other parameters began to be, by
    name.
    """
    with groups.device:
        chunks = [
            CLIPModel(architecture, options, groups.tensor, stages, stage.number, frozen)
            for stage in chunks_of(stages, groups.layout.pipeline, groups.pipeline_rank)
        ]
    # With one data-parallel rank there is nothing to split, only copies to make.
    wrapped = wrap_for_data_parallel(chunks, distributed_optimizer and groups.layout.data > 1)
    tensors = [tensor for _, tensor in global_parameters(chunks)]
    kept = FrozenWeights(tensors, groups.data_rank, groups.layout.data)
    optimizer, average = MegatronAdamW(wrapped, settings, trained_since), None
    if ema.decay is not None:
        average = WeightAverage(optimizer, tensors, ema.decay, ema.every)
    return TrainState(chunks, wrapped, optimizer, kept, average)
