"""A step's fullest moment, counted: the real step runs, and all tensors that are alive are added.

Forward and backward passes, the loss and the update are the trainer's own code: with fake tensors
in a fake world, of any size, in one process; with real ones in a real world.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_clip.config import Config
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.fake_world import FakeAnswers, fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.forward_backward import TwoPassStep
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.plan.build import build_loss, build_planned_state
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.live_bytes import LiveBytes


@dataclass(frozen=True)
class StepPeak:
    """Bytes of tensors alive on one rank. state: between two steps, without inputs; by_part: the
    most at once in each part of a step, state included: "first pass", "loss", "second pass",
    "update"."""

    state: int
    by_part: dict[str, int]

    @property
    def total(self) -> int:
        return self.by_part[self.fullest_part]

    @property
    def fullest_part(self) -> str:
        return max(self.by_part, key=self.by_part.__getitem__)


def count_step(config: Config, architecture: Architecture, plan: LayoutPlan, rank: int) -> StepPeak:
    """What `rank` of the layout holds at the fullest moment of a step. Touches no GPU, no memory to
    speak of, and takes seconds to minutes: each operation of the step is gone through.

    Raises RuntimeError in a process that has joined a process group.
    """
    if has_cuda():
        return call_without_gpus(count_step, config, architecture, plan, rank)
    with fake_rank(plan.layout, rank) as groups, FakeAnswers():
        return measure_step(config, architecture, plan, groups)


def measure_step(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups
) -> StepPeak:
    """The same in this process, as the rank that it is; called on all ranks of a real world."""
    with LiveBytes() as live:
        state = build_planned_state(config, architecture, plan, groups)
        _make_moments(state)
        loss = build_loss(plan, groups)
        loss_group = groups.pipeline if plan.loss_on_all_stages else None
        state.optimizer.zero_grad()
        held, peaks = live.now, {}
        inputs = _inputs(config, architecture, plan, groups)
        step = TwoPassStep(state.wrapped, inputs, loss, plan.stash, loss_group)
        with live.peak_of(peaks, "first pass"):
            step.first_pass()
        with live.peak_of(peaks, "loss"):
            step.compute_loss()
        with live.peak_of(peaks, "second pass"):
            step.second_pass()
        del step
        with live.peak_of(peaks, "update"):
            # Gradients that are to be clipped are scaled where they are.
            state.optimizer.squared_gradient_norm()
            state.optimizer.update(config.optimizer.lr)
        return StepPeak(held, peaks)


def _make_moments(state: TrainState) -> None:
    """As the first update does; without it the step that is counted would be that one."""
    for _, weight in state.global_parameters():
        if weight.requires_grad:
            zeros = torch.zeros_like(weight, dtype=torch.float32)
            state.optimizer.set_moments(weight, dict.fromkeys(MOMENTS, zeros), step=0)


def _inputs(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups
) -> StepInputs:
    """As the trainer's feed hands them out: texts of all microbatches; pictures that come as bytes,
    one microbatch ahead, and are normalized when they are asked for."""
    vision, text, batch = architecture.vision, architecture.text, plan.batch
    pairs, device = batch.micro_batch, groups.device
    ahead: dict[int, Tensor] = {}

    def prepare(number: int) -> None:
        ahead[number] = torch.zeros(pairs, 3, *vision.image_size, dtype=torch.uint8, device=device)

    def fetch(number: int) -> Pictures:
        if number not in ahead:
            prepare(number)
        # As `normalize` holds them; its constants are kept by the process, and these would be fake.
        images = ahead.pop(number).float().to(DTYPES[config.precision])
        if vision.patches_kept == vision.patches:
            return Pictures(images)
        return Pictures(images, torch.arange(vision.patches_kept, device=device).repeat(pairs, 1))

    shape = pairs * batch.captions, text.context_length
    texts = [
        torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(batch.microbatches)
    ]
    return StepInputs(texts, fetch, prepare)
