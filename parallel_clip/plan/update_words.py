"""The learning rates of the parts of a model, and what does not decay, in words."""

from __future__ import annotations

from parallel_clip.config import Freeze
from parallel_clip.config import Optimizer as OptimizerSettings
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import layer_groups
from parallel_clip.optimizer.update_rules import (
    layer_decay_of,
    update_rules,
    without_block_numbers,
)

_SHOWN = 4  # names of parameters


def update_words(
    architecture: Architecture, settings: OptimizerSettings, freeze: Freeze
) -> list[str]:
    """One line, or none where all is as by default. Of a frozen tower nothing is said.

    Raises:
        InputError: a pattern of `optimizer.no_decay` matches no parameter.
    """
    rules, groups = update_rules(architecture, settings), layer_groups(architecture)
    trained = {"logit_scale"}
    parts, rates = [], []
    for tower in ("vision", "text"):
        if getattr(freeze, tower) != "all":
            trained |= getattr(groups, tower).number.keys()
            rates.append(_tower_words(settings, tower, getattr(groups, tower).count))
    if {rules[name].lr_scale for name in trained} != {1.0}:
        rates.append(f"logit parameters {settings.lr * rules['logit_scale'].lr_scale:g}")
        parts = [f"highest learning rates: {', '.join(rates)}"]
    spared = [
        parameter.name
        for parameter in parameter_table(architecture)
        if parameter.decayed and parameter.name in trained and not rules[parameter.name].decayed
    ]
    if spared:
        names = without_block_numbers(spared)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        parts.append(f"no weight decay on norms, biases, logit parameters, {shown}{more}")
    return ["; ".join(parts)] if parts else []


def _tower_words(settings: OptimizerSettings, tower: str, count: int) -> str:
    """count: of its layer groups."""
    peak = getattr(settings, f"lr_{tower}")
    words = f"{tower} {settings.lr if peak is None else peak:g}"
    decay = layer_decay_of(settings, tower)
    if decay == 1:
        return words
    return f"{words} × {decay ** (count - 1):.3g} to 1 over {count} layer groups"
