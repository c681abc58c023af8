"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from parallel_clip.model.clip import CLIPModel, clamp_logit_scale
from parallel_clip.pipeline.schedule import ContrastiveLoss, Inputs, forward_backward
from parallel_clip.training.metrics import StepRecord
from parallel_clip.training.optimizer import DistributedDataParallel, Optimizer


def training_step(
    ddp: DistributedDataParallel,
    optimizer: Optimizer,
    loss: ContrastiveLoss,
    microbatches: Sequence[Inputs],
    schedule: str,
    lr: float,
) -> StepRecord:
    """Run one step on this rank's share of the global batch.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights of the last checkpoint
            are still whole.
    """
    model: CLIPModel = ddp.module
    logit_scale = model.logit_scale.exp().item()
    logit_bias = None if model.logit_bias is None else model.logit_bias.item()

    optimizer.zero_grad()
    value = forward_backward(ddp, microbatches, loss, schedule).item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} (logit_scale {logit_scale:.4g})")
    grad_norm = optimizer.step(lr)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm} (loss {value:.4g})")
    clamp_logit_scale(model)
    return StepRecord(value, grad_norm, lr, logit_scale, logit_bias)
