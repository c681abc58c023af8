"""What ranks do in test_step.py and test_optimizer.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.model.architectures import architecture_from_json
from parallel_clip.pipeline.schedule import choose_schedule
from parallel_clip.training.step import training_step
from tests.ranks import Weights, config_of, loaded_training, own_microbatches


class Task(NamedTuple):
    """A model with its weights, the global batch of every step, and the config of a run."""

    model_cfg: dict[str, Any]
    weights: Weights
    images: Tensor
    tokens: Tensor
    settings: dict[str, Any]


def train(
    groups: Groups, task: Task, steps: int, lr: float, microbatches: int
) -> tuple[list[dict], dict[str, Tensor]]:
    """The record of each step, and this rank's weights by name after the last."""
    config = config_of(groups.layout, **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    built = loaded_training(groups, config, architecture, task.weights)
    loss = {"infonce": ClipLoss, "sigmoid": SigLipLoss}[config.loss.kind](groups.data)
    batch = own_microbatches(groups, task.images, task.tokens, microbatches)
    schedule = choose_schedule(config.parallel.schedule, microbatches)
    records = [
        asdict(training_step(built.ddp, built.optimizer, loss, batch, schedule, lr))
        for _ in range(steps)
    ]
    return records, {p.name: tensor.detach() for p, tensor in built.model.global_parameters()}


def masters(groups: Groups, task: Task) -> dict[str, tuple[Tensor, Tensor, list[torch.dtype]]]:
    """After two steps in bf16, by name: what this rank owns of a tensor and its master, flat, and
    the dtypes of master, moments and accumulated gradient."""
    config = config_of(groups.layout, precision="bf16", **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    built = loaded_training(groups, config, architecture, task.weights)
    batch = own_microbatches(groups, task.images.bfloat16(), task.tokens, 2)
    for _ in range(2):
        training_step(built.ddp, built.optimizer, ClipLoss(groups.data), batch, "two-pass", 1e-3)
    held = {}
    for parameter, tensor in built.model.global_parameters():
        owned = built.optimizer.owned_state(tensor)
        if owned is not None:
            dtypes = [x.dtype for x in (owned.master, *owned.moments.values(), tensor.main_grad)]
            values = tensor.detach().reshape(-1)[owned.start : owned.stop]
            held[parameter.name] = values, owned.master.clone(), dtypes
    return held


def bad_number(groups: Groups, task: Task) -> tuple[str, bool]:
    """What a step says to pictures that are not finite, and whether the weights stayed."""
    config = config_of(groups.layout, **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    built = loaded_training(groups, config, architecture, task.weights)
    images = task.images.clone()
    images[0] = torch.inf
    batch = own_microbatches(groups, images, task.tokens, 1)
    before = [p.detach().clone() for p in built.model.parameters()]
    try:
        training_step(built.ddp, built.optimizer, ClipLoss(groups.data), batch, "stash", 1e-3)
    except FloatingPointError as error:
        same = all(map(torch.equal, before, built.model.parameters()))
        return str(error), same
    return "no error", False
