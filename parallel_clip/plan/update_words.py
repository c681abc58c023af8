"""The learning rates of the parts of a model, and what does not decay, in words."""

from __future__ import annotations

from parallel_clip.config import Optimizer as OptimizerSettings
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import layer_groups
from parallel_clip.optimizer.update_rules import (
    layer_decay_of,
    update_rules,
    without_block_numbers,
)

_SHOWN = 4  # names of parameters


def update_words(architecture: Architecture, settings: OptimizerSettings) -> list[str]:
    """One line, or none where all is as by default.

    Raises:
        InputError: a pattern of `optimizer.no_decay` matches no parameter.
    """
    rules = update_rules(architecture, settings)
    parts = []
    if {rule.lr_scale for rule in rules.values()} != {1.0}:
        towers = [_tower_words(architecture, settings, tower) for tower in ("vision", "text")]
        logit = settings.lr * rules["logit_scale"].lr_scale
        parts = [f"highest learning rates: {', '.join(towers)}, logit parameters {logit:g}"]
    spared = [
        parameter.name
        for parameter in parameter_table(architecture)
        if parameter.decayed and not rules[parameter.name].decayed
    ]
    if spared:
        names = without_block_numbers(spared)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        parts.append(f"no weight decay on norms, biases, logit parameters, {shown}{more}")
    return ["; ".join(parts)] if parts else []


def _tower_words(architecture: Architecture, settings: OptimizerSettings, tower: str) -> str:
    peak = getattr(settings, f"lr_{tower}")
    words = f"{tower} {settings.lr if peak is None else peak:g}"
    decay = layer_decay_of(settings, tower)
    if decay == 1:
        return words
    count = getattr(layer_groups(architecture), tower).count
    return f"{words} × {decay ** (count - 1):.3g} to 1 over {count} layer groups"
