"""What ranks do in test_schedule.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.pipeline.schedule import forward_backward
from parallel_clip.training.optimizer import wrap_for_data_parallel
from tests.ranks import Weights, loaded_model, own_microbatches

LOSSES = {"infonce": ClipLoss, "sigmoid": SigLipLoss}


class Way(NamedTuple):
    """How a step runs: in how many microbatches, and by which schedule."""

    schedule: str
    microbatches: int


def steps(
    groups: Groups,
    model_cfg: dict[str, Any],
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    kept: Tensor | None,
    loss: str,
    ways: list[Way],
    recompute: str,
) -> dict[Way, tuple[float, dict[str, Tensor]]]:
    """The loss and this rank's reduced gradients by name, for the same weights in several ways."""
    model = loaded_model(
        groups, model_cfg, weights, sequence=groups.layout.sequence, recompute=recompute
    )
    ddp = wrap_for_data_parallel(model, distributed_optimizer=False)
    outcomes = {}
    for way in ways:
        ddp.zero_grad_buffer()
        value = forward_backward(
            ddp,
            own_microbatches(groups, images, tokens, way.microbatches, kept),
            LOSSES[loss](groups.data),
            way.schedule,
        )
        gradients = {p.name: tensor.main_grad.clone() for p, tensor in model.global_parameters()}
        outcomes[way] = value.item(), gradients
    return outcomes
