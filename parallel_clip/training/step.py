"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
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
    stages_help: bool = False,
) -> StepRecord:
    """Run one step on this rank's share of the global batch; the same record on every rank.

    stash: the microbatches that keep their graphs, see pipeline/schedule.py; stages_help: whether
    `loss` is spread over the stages of the pipeline.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; weights of the last checkpoint
            are still whole.
    """
    optimizer = built.optimizer
    logit_scale, logit_bias = read_logit_parameters(built.chunks, pipeline_group)
    optimizer.zero_grad()
    helping = pipeline_group if stages_help else None
    report = forward_backward(built.wrapped, microbatches, loss, stash, helping)
    loss_value, *bad = from_last_stage(torch.stack(report), pipeline_group).tolist()
    if not math.isfinite(loss_value):
        raise FloatingPointError(
            f"the loss is {loss_value} (logit_scale {logit_scale:.4g}); {_where_it_began(*bad)}"
        )
    grad_norm = optimizer.step(lr)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm} (loss {loss_value:.4g})")
    clamp_logit_scale(built.chunks[-1])
    return StepRecord(loss_value, grad_norm, lr, logit_scale, logit_bias)


def _where_it_began(bad_images: float, bad_texts: float) -> str:
    """Which features of which ranks are not finite. Called by all ranks, as the loss is one."""
    everyones: list = [(bad_images, bad_texts)]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (bad_images, bad_texts))
    sides = [
        f"{side} features of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        for number, side in enumerate(("image", "text"))
        if (ranks := [rank for rank, bad in enumerate(everyones) if bad[number]])
    ]
    if not sides:
        return "all features are finite: the multiplier, the bias or the loss itself is not"
    return f"not finite: {' and '.join(sides)}"
