"""Build a rank's part of the model and its optimizer as a config and its layout plan ask."""

from __future__ import annotations

from parallel_clip.config import Config
from parallel_clip.engine.groups import Groups
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import frozen_parts
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.optimizer.train_state import TrainState, build_train_state
from parallel_clip.plan.layout_plan import LayoutPlan


def build_planned_state(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups
) -> TrainState:
    """The training state of this rank; its weights are not set yet. Serves the trainer and, on fake
    tensors, the memory count."""
    options = ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=config.parallel.sequence,
        deterministic=config.deterministic,
        virtual_pipeline=plan.layout.virtual_pipeline,
        microbatch_group=plan.microbatch_group,
    )
    return build_train_state(
        architecture,
        options,
        plan.stages,
        groups,
        config.optimizer,
        distributed_optimizer=config.parallel.distributed_optimizer,
        frozen=frozen_parts(architecture, config.freeze),
    )
