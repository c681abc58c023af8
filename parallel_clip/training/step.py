"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.distributed import ProcessGroup

from parallel_clip.model.clip import clamp_logit_scale
from parallel_clip.pipeline.last_stage import from_last_stage, read_logit_parameters
from parallel_clip.pipeline.schedule import ContrastiveLoss, Inputs, forward_backward
from parallel_clip.training.build import Built
from parallel_clip.training.metrics import StepRecord


def training_step(
    built: Built,
    loss: ContrastiveLoss,
    microbatches: Sequence[Inputs],
    stash: int,
    lr: float,
    pipeline_group: ProcessGroup,
) -> StepRecord:
    """Run one step on this rank's share of the global batch; the same record on every rank.

    stash: the microbatches that keep their graphs, see pipeline/schedule.py.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights of the last checkpoint
            are still whole.
    """
    optimizer = built.optimizer
    logit_scale, logit_bias = read_logit_parameters(built.chunks, pipeline_group)
    optimizer.zero_grad()
    value = forward_backward(built.wrapped, microbatches, loss, stash)
    loss_value = from_last_stage(value, pipeline_group).item()
    if not math.isfinite(loss_value):
        raise FloatingPointError(f"the loss is {loss_value} (logit_scale {logit_scale:.4g})")
    grad_norm = optimizer.step(lr)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm} (loss {loss_value:.4g})")
    clamp_logit_scale(built.chunks[-1])
    return StepRecord(loss_value, grad_norm, lr, logit_scale, logit_bias)
