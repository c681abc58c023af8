"""What ranks do in test_another_tower.py."""

from __future__ import annotations

from torch import Tensor

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss
from parallel_clip.model.architecture import Architecture
from parallel_clip.training.step import TrainStep
from tests.ranks import Weights, config_of, loaded_training, own_microbatches

LR, STEPS = 1e-3, 4


def train(
    groups: Groups,
    architecture: Architecture,
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    microbatches: int,
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of each step, and this rank's gradients by name in the first."""
    built = loaded_training(groups, config_of(groups.layout), architecture, weights)
    batch = own_microbatches(groups, images, tokens, microbatches)
    loss = ClipLoss(group=groups.data, helpers=groups.tensor)
    train_step = TrainStep(built, loss, 0, groups.pipeline)
    records, gradients = [], {}
    for step in range(STEPS):
        record = train_step(batch, LR).record
        records.append((record.loss, record.grad_norm))
        if step == 0:
            gradients = {p.name: t.main_grad.clone() for p, t in built.global_parameters()}
    return records, gradients
