"""What ranks do in test_padding.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ClipLoss
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.training.step import TrainStep
from tests.ranks import config_of, empty_training, loaded_training, own_microbatches, padding_mask
from tests.training.step_cases import Task

OTHER = 7.0  # what memory held before


class Held(NamedTuple):
    """Of one tensor and what goes with it (its "weight", "gradient", "master", or a moment): how
    many entries are padding, how many of those are not zero, and the largest other one."""

    tensor: str
    what: str
    padding: int
    not_zero: int
    largest: float


def train_and_load(groups: Groups, task: Task, steps: int, run_dir: Path) -> list[list[Held]]:
    """What this rank holds after so many steps, and what one holds that has loaded their checkpoint
    into memory full of other numbers."""
    architecture = architecture_from_json(task.model_cfg, "small")
    config = config_of(groups.layout, **task.settings)
    state = loaded_training(groups, config, architecture, task.weights)
    pictures = task.images.to(DTYPES[config.precision])
    batch = own_microbatches(groups, pictures, task.tokens, 2)
    step = TrainStep(state, ClipLoss(group=groups.data), 0, groups.pipeline)
    for _ in range(steps):
        norm = step(batch, lr=1e-3).record.grad_norm
        assert config.optimizer.clip_grad_norm is None or norm > config.optimizer.clip_grad_norm
    trained = list(_held(state, groups))

    if groups.is_rank_zero:
        run_dir.mkdir()
    meta = Meta(steps, steps * len(pictures), 0, "small", task.model_cfg, {}, updates=steps)
    Checkpointer(run_dir, groups).save(meta, state)
    loaded = empty_training(groups, config, architecture)
    for _, tensor in loaded.global_parameters():
        other = torch.full(tensor.shape, OTHER)
        loaded.set_weight(tensor, other)
        loaded.optimizer.set_moments(tensor, dict.fromkeys(MOMENTS, other), step=1)
        tensor.main_grad.zero_()
    Checkpointer(run_dir, groups).load(commit.latest(run_dir), loaded)
    return [trained, list(_held(loaded, groups))]


def _held(state: TrainState, groups: Groups):
    for parameter, tensor in state.global_parameters():
        mask = padding_mask(parameter, groups.tensor_rank, groups.layout.tensor).flatten()
        found = {"weight": (tensor.detach(), mask), "gradient": (tensor.main_grad, mask)}
        owned = state.optimizer.owned_state(tensor)
        if owned is not None:
            own_mask = mask[owned.start : owned.stop]
            found |= {kind: (values, own_mask) for kind, values in owned.moments.items()}
            found["master"] = owned.master, own_mask
        for what, (values, padding) in found.items():
            yield _count(parameter.name, what, values.flatten().float(), padding)


def _count(name: str, what: str, values: Tensor, padding: Tensor) -> Held:
    dead, real = values[padding], values[~padding]
    largest = float(real.abs().max()) if len(real) else 0.0
    return Held(name, what, len(dead), int((dead != 0).sum()), largest)
