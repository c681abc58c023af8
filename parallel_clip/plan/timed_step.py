"""Seconds of real steps of a planned run, on noise in place of pictures and captions."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel_clip.config import Config
from parallel_clip.engine.device import synchronize
from parallel_clip.engine.groups import Groups
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.parameters import local_slice
from parallel_clip.pipeline.forward_backward import forward_backward
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.plan.build import build_loss, build_planned_state
from parallel_clip.plan.layout_plan import LayoutPlan

Clock = Callable[[], float]
LR = 1e-6  # weights hardly move, so that no step differs from another


def timed_steps(
    config: Config,
    architecture: Architecture,
    plan: LayoutPlan,
    groups: Groups,
    steps: int,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Seconds of `steps` warm steps, forward, loss, backward and update, as the slowest rank takes.
    Called on all ranks. clock: what gives seconds, such as `time.process_time` on a CPU that others
    use, too."""
    state = build_planned_state(config, architecture, plan, groups)
    for parameter, tensor in state.global_parameters():
        whole, ranks = initial_value(parameter, config.seed), groups.layout.tensor
        own = local_slice(whole, parameter.placement, groups.tensor_rank, ranks)
        state.set_weight(tensor, own.to(groups.device))
    inputs = random_inputs(config, architecture, plan, groups)
    loss = build_loss(plan, groups)
    loss_group = groups.pipeline if plan.loss_on_all_stages else None

    def step() -> None:
        state.optimizer.zero_grad()
        forward_backward(state.wrapped, inputs, loss, plan.stash, loss_group)
        squared_norm, _ = state.optimizer.squared_gradient_norm()
        state.optimizer.clip_gradients(squared_norm.item() ** 0.5)
        state.optimizer.update(LR)

    return slowest_of_ranks(step, steps, groups, clock)


def random_inputs(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups
) -> StepInputs:
    """The same pictures and texts for all microbatches; each text ends by the highest id."""
    pairs, device = plan.batch.micro_batch, groups.device
    texts = pairs * plan.batch.captions
    vision, text = architecture.vision, architecture.text
    generator = torch.Generator().manual_seed(groups.data_rank)
    tokens = torch.randint(
        1, text.vocab_size - 1, (texts, text.context_length), generator=generator
    )
    tokens[:, -1] = text.vocab_size - 1
    images = torch.randn(pairs, 3, *vision.image_size, generator=generator)
    kept = None
    if vision.patches_kept < vision.patches:
        kept = torch.arange(vision.patches_kept).expand(pairs, -1).to(device)
    pictures = Pictures(images.to(device), kept)
    return StepInputs([tokens.to(device)] * plan.batch.microbatches, lambda number: pictures)


def slowest_of_ranks(
    function: Callable[[], object], times: int, groups: Groups, clock: Clock = time.perf_counter
) -> list[float]:
    """Seconds of each of so many calls on all ranks at once, of the rank that takes longest, after
    one that is not counted."""
    seconds = []
    for _ in range(1 + times):
        if groups.layout.world > 1:
            dist.barrier(group=groups.world)
        synchronize()
        start = clock()
        function()
        synchronize()
        seconds.append(clock() - start)
    if groups.layout.world > 1:
        slowest = torch.tensor(seconds, dtype=torch.float64, device=groups.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=groups.world)
        seconds = slowest.tolist()
    return seconds[1:]
