"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel_clip.config import Loss
from parallel_clip.engine.collectives import broadcast_from_last_stage, gather_objects
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
    loss_on_all_stages: whether `loss` is computed on all stages of the pipeline; complain: given a
    loss and a gradient norm, what is wrong with the step, or None (`BadStepPolicy.complaint`);
    world: the ranks that have to agree on that; None: this one alone.
    """

    state: TrainState
    loss: ContrastiveLoss
    stash: int
    pipeline_group: ProcessGroup
    loss_on_all_stages: bool = False
    complain: Callable[[float, float], str | None] = lambda loss, grad_norm: None
    world: ProcessGroup | None = None

    def __call__(self, inputs: StepInputs, lr: float) -> StepRecord:
        """Run forward, backward and the optimizer; the same record on every rank.

        Where any rank has a complaint, no weight, moment or counter changes, and the record has it.
        """
        state, group = self.state, self.pipeline_group
        loss_group = group if self.loss_on_all_stages else None
        logit_scale, logit_bias = read_logit_parameters(state.chunks, group)
        state.optimizer.zero_grad()
        report = forward_backward(state.wrapped, inputs, self.loss, self.stash, loss_group)
        loss_and_bad = broadcast_from_last_stage(torch.stack(report), group)
        loss_value, *bad = loss_and_bad.tolist()
        found = loss_value, state.optimizer.clip_gradients()
        complaint, (loss_value, grad_norm) = self._agree(
            self.complain(*found), found, loss_and_bad.device
        )
        if complaint is None:
            state.optimizer.update(lr)
            clamp_logit_scale(state.chunks[-1])
        elif not math.isfinite(loss_value):
            where = nonfinite_ranks(*bad, self.world)
            complaint = f"{complaint} (logit_scale {logit_scale:.4g}); {where}"
        return StepRecord(loss_value, grad_norm, lr, logit_scale, logit_bias, complaint)

    def _agree(
        self, complaint: str | None, found: tuple[float, float], device: torch.device
    ) -> tuple[str | None, tuple[float, float]]:
        """The complaint of any rank, with the loss and gradient norm that it found: a flipped bit
        may show on one alone. Without one this rank's own."""
        if self.world is None:
            return complaint, found
        any_complaint = torch.tensor(float(complaint is not None), device=device)
        dist.all_reduce(any_complaint, op=dist.ReduceOp.MAX, group=self.world)
        if not any_complaint.item():
            return None, found
        return next(own for own in gather_objects((complaint, found), self.world) if own[0])


def nonfinite_ranks(bad_images: float, bad_texts: float, world: ProcessGroup | None) -> str:
    """Name the ranks of `world` whose features are not finite. Called by all of them."""
    everyones = gather_objects((bad_images, bad_texts), world)
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
