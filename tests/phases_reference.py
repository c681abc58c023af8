"""The plain thing that phases are compared with: open_clip, one process, one batch, AdamW, and a
new model and a new optimizer wherever a phase begins.

Nothing here uses parallel_clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.loss import ClipLoss
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from tests.reference import (
    Batch,
    Reference,
    build_model,
    decayed,
    feed_patch_dropout,
    lock_towers,
)

POSITIONS = "visual.positional_embedding"


@dataclass(frozen=True)
class ReferencePhase:
    """steps: how many; model_cfg: at its size, without patch dropout; batch: at that size;
    learning_rate and kept_patches: by the step of the run, counted from 0 (see `reference_run`);
    freeze: as in `lock_towers`."""

    steps: int
    model_cfg: dict[str, Any]
    batch: Batch
    learning_rate: Callable[[int], float]
    kept_patches: Callable[[int], Tensor] | None = None
    freeze: dict[str, Any] | None = None


def phases_run(
    phases: Sequence[ReferencePhase],
    weights: dict[str, Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
) -> Reference:
    """Trains OpenCLIP's model on the whole batch at once, phase after phase, and averages its
    weights. weights: of any size.

    Positions, their average and both moments of them are what `resize_pos_embed` makes of them; a
    second moment that it makes less than 0 is 0.
    """
    records: list[dict[str, float | None]] = []
    before: dict[str, dict[str, Tensor]] = {}
    averages = weights
    for phase in phases:
        model = build_model(phase.model_cfg)
        model.load_state_dict(_resized(weights, model))
        lock_towers(model, phase.freeze or {})
        model.train()
        fed = feed_patch_dropout(model) if phase.kept_patches is not None else None
        named = dict(model.named_parameters())
        averages = _resized(averages, model)
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named.items() if decayed(n, p)]},
                {"params": [p for n, p in named.items() if not decayed(n, p)], "weight_decay": 0.0},
            ],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        for name, state in before.items():
            resized = {key: _resized({name: value}, model)[name] for key, value in state.items()}
            resized["exp_avg_sq"] = resized["exp_avg_sq"].clamp(min=0)
            optimizer.state[named[name]] = resized
        for _ in range(phase.steps):
            step = len(records)
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate(step)
            if fed is not None:
                fed.kept = phase.kept_patches(step)
            records.append(_train_step(model, optimizer, phase.batch, phase.learning_rate(step)))
            averages = {
                name: ema_decay * averages[name] + (1 - ema_decay) * parameter.detach()
                for name, parameter in named.items()
            }
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        before = {
            name: {key: value.clone() for key, value in optimizer.state[p].items()}
            for name, p in named.items()
            if optimizer.state[p]
        }
    return Reference(records, weights, averages)


def _resized(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """With the positions of the image tower, if they are among them, at the size of `model`."""
    tensors = dict(tensors)
    if POSITIONS in tensors and tensors[POSITIONS].ndim:
        resize_pos_embed(tensors, model)
    return tensors


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float
) -> dict[str, float | None]:
    optimizer.zero_grad()
    value = ClipLoss()(*model(batch.images, batch.texts))
    value.backward()
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    record = {
        "loss": value.item(),
        "grad_norm": math.sqrt(sum(g.square().sum().item() for g in gradients)),
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None,
        "lr": lr,
    }
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return record
