"""Learning rates of parts of a model and what decays: configs, and the same in torch's own
parameter groups of OpenCLIP's model. Depths are OpenCLIP's: what `lock` unlocks, group by group."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# By name, keys of the section `optimizer`.
UPDATES: dict[str, dict[str, Any]] = {
    "embeddings-spared": {
        "lr_vision": 2e-4,
        "lr_text": 1e-3,
        "lr_logit": 2e-3,
        "layer_decay": {"vision": 0.65, "text": 0.8},
        "no_decay": "openclip4",
    },
    "patterns-spared": {"lr_text": 2e-4, "layer_decay": 0.7, "no_decay": ["*mlp*", "*token*"]},
}
EMBEDDINGS = ("positional_embedding", "class_embedding", "pos_embed", "cls_token")


def groups_of(
    settings: dict[str, Any], lr: float
) -> Callable[[nn.Module, float], list[dict[str, Any]]]:
    """For `reference_run`: a parameter group for each parameter."""
    decay = settings["layer_decay"]
    decays = decay if isinstance(decay, dict) else {"vision": decay, "text": decay}

    def make(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        above = {
            "vision": groups_above(model, model.lock_image_tower, "visual."),
            "text": groups_above(model, model.lock_text_tower, ""),
        }
        groups = []
        for name, parameter in model.named_parameters():
            scale = settings.get("lr_logit", lr) / lr
            if name not in ("logit_scale", "logit_bias"):
                tower = "vision" if name.startswith("visual.") else "text"
                peak = settings.get(f"lr_{tower}", lr)
                scale = peak / lr * decays[tower] ** above[tower][name]
            spared = parameter.ndim < 2 or is_spared(name, settings["no_decay"])
            groups.append(
                {
                    "params": [parameter],
                    "lr_scale": scale,
                    "weight_decay": 0.0 if spared else weight_decay,
                }
            )
        return groups

    return make


def is_spared(name: str, no_decay: str | list[str]) -> bool:
    if no_decay == "openclip4":
        return name.endswith(EMBEDDINGS)
    return any(fnmatchcase(name, pattern) for pattern in no_decay)


def groups_above(model: nn.Module, lock: Callable[[int], None], prefix: str) -> dict[str, int]:
    """How many groups of its tower are nearer to the features than a parameter's own."""
    found: dict[str, int] = {}
    unlocked = 0
    while True:
        model.requires_grad_(True)
        lock(unlocked)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        found |= {
            name: unlocked - 1
            for name in trained
            if name not in found and name.startswith(prefix) and unlocked > 0
        }
        if unlocked > 0 and len(trained) == sum(1 for _ in model.parameters()):
            return found
        unlocked += 1
