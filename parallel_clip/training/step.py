"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel_clip.config import Config
from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.loss.contrastive import ContrastiveLoss
from parallel_clip.model.clip import clamp_logit_scale
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.forward_backward import MicrobatchInputs, forward_backward
from parallel_clip.pipeline.logit_parameters import read_logit_parameters
from parallel_clip.training.run_log import StepRecord


def training_step(
    built: TrainState,
    loss: ContrastiveLoss,
    microbatches: Sequence[MicrobatchInputs],
    stash: int,
    lr: float,
    pipeline_group: ProcessGroup,
    loss_on_all_stages: bool = False,
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
    helping = pipeline_group if loss_on_all_stages else None
    report = forward_backward(built.wrapped, microbatches, loss, stash, helping)
    loss_value, *bad = broadcast_from_last_stage(torch.stack(report), pipeline_group).tolist()
    if not math.isfinite(loss_value):
        raise FloatingPointError(
            f"the loss is {loss_value} (logit_scale {logit_scale:.4g}); {nonfinite_ranks(*bad)}"
        )
    grad_norm = optimizer.step(lr)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm} (loss {loss_value:.4g})")
    clamp_logit_scale(built.chunks[-1])
    return StepRecord(loss_value, grad_norm, lr, logit_scale, logit_bias)


def nonfinite_ranks(bad_images: float, bad_texts: float) -> str:
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


def build_loss(config: Config, groups: Groups, loss_on_all_stages: bool) -> ContrastiveLoss:
    """The loss over the data-parallel ranks, its work split over the tensor-parallel ones, and over
    the stages of the pipeline if they help."""
    kind = {"infonce": ClipLoss, "sigmoid": SigLipLoss}[config.loss.kind]
    settings = config.loss
    return kind(
        group=groups.data,
        helpers=groups.model if loss_on_all_stages else groups.tensor,
        exchange=settings.exchange,
        tile=settings.tile,
    )
