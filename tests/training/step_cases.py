"""What ranks do in test_step.py and test_optimizer.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel_clip.config import BadSteps
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import choose_stash
from parallel_clip.training.bad_steps import BadStepPolicy
from parallel_clip.training.step import TrainStep
from tests.ranks import Weights, config_of, loaded_training, own_microbatches

LOSSES = {"infonce": ClipLoss, "sigmoid": SigLipLoss}


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
    loss = LOSSES[config.loss.kind](group=groups.data)
    batch = own_microbatches(groups, task.images, task.tokens, microbatches)
    stash = choose_stash(config.parallel, microbatches)
    step = TrainStep(built, loss, stash, groups.pipeline)
    records = [asdict(step(batch, lr).record) for _ in range(steps)]
    assert all(record.pop("complaint") is None for record in records)
    return records, {p.name: tensor.detach() for p, tensor in built.global_parameters()}


def masters(groups: Groups, task: Task) -> dict[str, tuple[Tensor, Tensor, list[torch.dtype]]]:
    """After two steps in bf16, by name: what this rank owns of a tensor and its master, flat, and
    the dtypes of master, moments and accumulated gradient."""
    config = config_of(groups.layout, precision="bf16", **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    built = loaded_training(groups, config, architecture, task.weights)
    batch = own_microbatches(groups, task.images.bfloat16(), task.tokens, 2)
    step = TrainStep(built, ClipLoss(group=groups.data), 0, groups.pipeline)
    for _ in range(2):
        step(batch, lr=1e-3)
    held = {}
    for parameter, tensor in built.global_parameters():
        owned = built.optimizer.owned_state(tensor)
        if owned is not None:
            dtypes = [x.dtype for x in (owned.master, *owned.moments.values(), tensor.main_grad)]
            values = tensor.detach().reshape(-1)[owned.start : owned.stop]
            held[parameter.name] = values, owned.master.clone(), dtypes
    return held


def bad_number(groups: Groups, task: Task) -> tuple[str, bool]:
    """What a step complains of about pictures that are not finite, and whether the weights stayed;
    with the sigmoid loss, the step was to measure the bias."""
    config = config_of(groups.layout, **task.settings)
    architecture = architecture_from_json(task.model_cfg, "small")
    built = loaded_training(groups, config, architecture, task.weights)
    images = task.images.clone()
    images[0] = torch.inf
    batch = own_microbatches(groups, images, task.tokens, 1)
    before = [p.detach().clone() for _, p in built.global_parameters()]
    kind = config.loss.kind
    complain, loss = BadStepPolicy(BadSteps()).complaint, LOSSES[kind](group=groups.data)
    step = TrainStep(built, loss, 1, groups.pipeline, complain=complain, world=groups.world)
    complaint = step(batch, lr=1e-3, measures_bias=kind == "sigmoid").record.complaint
    after = [p for _, p in built.global_parameters()]
    return complaint or "no complaint", all(map(torch.equal, before, after))
