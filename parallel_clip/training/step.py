"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel_clip.config import Loss
from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.loss.contrastive import ContrastiveLoss
from parallel_clip.model.clip import clamp_logit_scale
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.forward_backward import forward_backward
from parallel_clip.pipeline.inputs import StepInputs
from parallel_clip.pipeline.logit_parameters import read_logit_parameters
from parallel_clip.training.run_log import StepRecord


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step on this rank's share of the global batch. Made once for a run.

    stash: the microbatches of a step that keep their graphs (see pipeline/forward_backward.py);
    loss_on_all_stages: whether `loss` is computed on all stages of the pipeline.
    """

    state: TrainState
    loss: ContrastiveLoss
    stash: int
    pipeline_group: ProcessGroup
    loss_on_all_stages: bool = False

    def __call__(self, inputs: StepInputs, lr: float) -> StepRecord:
        """Run forward, backward and the optimizer; the same record on every rank.

        Raises:
            FloatingPointError: the loss is not finite, before the weights change; or the gradient
                norm is not, and the weights are only whole in the last checkpoint.
        """
        state, group = self.state, self.pipeline_group
        loss_group = group if self.loss_on_all_stages else None
        logit_scale, logit_bias = read_logit_parameters(state.chunks, group)
        state.optimizer.zero_grad()
        report = forward_backward(state.wrapped, inputs, self.loss, self.stash, loss_group)
        loss_value, *bad = broadcast_from_last_stage(torch.stack(report), group).tolist()
        if not math.isfinite(loss_value):
            raise FloatingPointError(
                f"the loss is {loss_value} (logit_scale {logit_scale:.4g}); {nonfinite_ranks(*bad)}"
            )
        grad_norm = state.optimizer.step(lr)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm is {grad_norm} (loss {loss_value:.4g})")
        clamp_logit_scale(state.chunks[-1])
        return StepRecord(loss_value, grad_norm, lr, logit_scale, logit_bias)


def nonfinite_ranks(bad_images: float, bad_texts: float) -> str:
    """Name the ranks whose features are not finite. Called by all ranks: the loss is the same on
    all."""
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


def build_loss(settings: Loss, groups: Groups, on_all_stages: bool) -> ContrastiveLoss:
    """The loss over the data-parallel ranks, its work split over the tensor-parallel ranks, and
    over the stages of the pipeline too where it is `on_all_stages`."""
    loss = ClipLoss if settings.kind == "infonce" else SigLipLoss
    helpers = groups.model if on_all_stages else groups.tensor
    return loss(group=groups.data, helpers=helpers, exchange=settings.exchange, tile=settings.tile)
