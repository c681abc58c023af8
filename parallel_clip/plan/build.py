"""Build a rank's part of the model, its optimizer and the loss as a config and its plan ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from parallel_clip.config import Config, Freeze, PartlyFrozen
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.loss.contrastive import ContrastiveLoss
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import FrozenParts, FrozenTower, freeze_tower
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.optimizer.train_state import TrainState, build_train_state
from parallel_clip.plan.layout_plan import LayoutPlan


def build_planned_state(
    config: Config,
    architecture: Architecture,
    plan: LayoutPlan,
    groups: Groups,
    trained_since: Mapping[str, int] | None = None,
) -> TrainState:
    """The training state of this rank; its weights are not set yet. Serves the trainer and, on fake
    tensors, the memory count. trained_since: see `build_train_state`."""
    options = ModelOptions(
        precision=config.precision,
        recompute=config.recompute,
        sequence=config.parallel.sequence,
        deterministic=config.deterministic,
        virtual_pipeline=plan.layout.virtual_pipeline,
        microbatch_group=plan.microbatch_group,
        captions=plan.batch.captions,
    )
    return build_train_state(
        architecture,
        options,
        plan.stages,
        groups,
        config.optimizer,
        distributed_optimizer=config.parallel.distributed_optimizer,
        frozen=frozen_parts(architecture, config.freeze),
        trained_since=trained_since,
        ema=config.ema,
    )


def build_loss(plan: LayoutPlan, groups: Groups) -> ContrastiveLoss:
    """The loss over the data-parallel ranks, its work split over the tensor-parallel ranks, and
    over the stages of the pipeline too where all of them work on it."""
    settings = plan.loss
    ways = {
        "group": groups.data,
        "helpers": groups.model if plan.loss_on_all_stages else groups.tensor,
        "exchange": settings.exchange,
        "tile": settings.tile,
        "captions_per_image": plan.batch.captions,
    }
    if settings.kind == "sigmoid":
        return SigLipLoss(**ways)
    return ClipLoss(**ways, label_smoothing=settings.label_smoothing)


def frozen_parts(architecture: Architecture, freeze: Freeze) -> FrozenParts:
    """What `freeze` keeps from training.

    Raises:
        InputError: more groups are unlocked than a tower has.
    """

    def of(tower: Literal["vision", "text"], how: Literal["all"] | PartlyFrozen | None):
        if how is None:
            return FrozenTower()
        if how == "all":
            return freeze_tower(architecture, tower)
        return freeze_tower(architecture, tower, how.unlocked_groups, how.norms)

    return FrozenParts(of("vision", freeze.vision), of("text", freeze.text))
