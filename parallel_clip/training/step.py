"""One optimizer step, from the batch on the device to the updated weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.loss.contrastive import ContrastiveLoss
from parallel_clip.model.clip import clamp_logit_scale
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.forward_backward import forward_backward
from parallel_clip.pipeline.inputs import StepInputs
from parallel_clip.pipeline.logit_parameters import own_logit_parameters
from parallel_clip.training.exchange import tell_all
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

    def __call__(
        self,
        inputs: StepInputs,
        lr: float,
        tell: Callable[[], Sequence[float]] = tuple,
        measures_bias: bool = False,
    ) -> StepResult:
        """Run forward, backward and the optimizer; the same record on every rank. `tell` is called
        once all of this rank's work but the update is under way. measures_bias: begin with the
        bias that is best for this batch, instead of the model's.

        Where any rank has a complaint, no weight, moment or counter changes, and the record has it.
        """
        state, group = self.state, self.pipeline_group
        loss_group = group if self.loss_on_all_stages else None
        state.optimizer.zero_grad()
        set_bias = self._set_bias if measures_bias else None
        report = forward_backward(
            state.wrapped, inputs, self.loss, self.stash, loss_group, set_bias
        )
        of_loss = torch.cat([torch.stack(report), own_logit_parameters(state.chunks)])
        broadcast_from_last_stage(of_loss, group)
        squared_norm, all_finite = state.optimizer.squared_gradient_norm()
        numbers = torch.cat([of_loss, torch.stack([squared_norm, all_finite.float()])])
        # The one time in a step that the host waits for the device: before the update, which a bad
        # step must not do.
        everyones = tell_all(numbers, tell(), numbers.device, self.world)

        found = [_Found.of(row) for row in everyones]
        own = found[0 if self.world is None else self.world.rank()]
        complaint, told = self._first_complaint(found)
        loss, grad_norm = (told or own).loss, (told or own).grad_norm
        if complaint is None:
            state.optimizer.clip_gradients(grad_norm)
            state.optimizer.update(lr)
            clamp_logit_scale(state.chunks[-1])
        elif not math.isfinite(loss):
            where = nonfinite_ranks([(each.bad_images, each.bad_texts) for each in found])
            complaint = f"{complaint} (logit_scale {own.logit_scale:.4g}); {where}"
        has_bias = state.chunks[-1].architecture.init_logit_bias is not None
        bias = own.logit_bias if has_bias else None
        record = StepRecord(loss, grad_norm, lr, own.logit_scale, bias, complaint)
        return StepResult(record, everyones[:, _NUMBERS:])

    def _set_bias(self, bias: Tensor) -> None:
        """On the last stage; its own where `bias` is NaN."""
        tensor = self.state.chunks[-1].logit_bias
        bias = torch.where(bias.isnan(), tensor.detach(), bias)
        self.state.set_weight(tensor, bias)
        if self.state.average is not None:
            self.state.average.set(tensor, bias)

    def _first_complaint(self, found: Sequence[_Found]) -> tuple[str | None, _Found | None]:
        """The complaint of the first rank that has one, with what it found: a flipped bit may show
        on one alone."""
        asked: set[tuple[float, float]] = set()
        for each in found:
            if (each.loss, each.grad_norm) not in asked:  # they differ on none, nearly always
                asked.add((each.loss, each.grad_norm))
                complaint = self.complain(each.loss, each.grad_norm)
                if complaint is not None:
                    return complaint, each
        return None, None


class StepResult(NamedTuple):
    """The record of a step, and what `tell` gave on each rank, fp64 [ranks, n]."""

    record: StepRecord
    told: np.ndarray


class _Found(NamedTuple):
    """What a rank knows at the end of backward."""

    loss: float
    bad_images: float
    bad_texts: float
    logit_scale: float
    logit_bias: float
    grad_norm: float  # NaN where a gradient of the rank is not finite

    @classmethod
    def of(cls, row: np.ndarray) -> _Found:
        *of_loss, squared_norm, all_finite = row[:_NUMBERS].tolist()
        return cls(*of_loss, squared_norm**0.5 if all_finite else float("nan"))


_NUMBERS = len(_Found._fields) + 1


def nonfinite_ranks(bad_features: Sequence[tuple[float, float]]) -> str:
    """Name the ranks whose features are not finite. bad_features: of each, how many picture and
    text features are not."""
    sides = [
        f"{side} features of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        for number, side in enumerate(("image", "text"))
        if (ranks := [rank for rank, bad in enumerate(bad_features) if bad[number]])
    ]
    if not sides:
        return "all features are finite: the multiplier, the bias or the loss itself is not"
    return f"not finite: {' and '.join(sides)}"
