"""The learning rate of each step: a pure function."""

from __future__ import annotations

import math

from parallel_clip.config import LearningRateSchedule


def learning_rate(step: int, total: int, peak: float, schedule: LearningRateSchedule) -> float:
    """The learning rate of step `step`, counted from 0, of a run of `total` steps.

    Linear warmup to `peak`; then a cosine to `min_lr` (Loshchilov and Hutter, arXiv 1608.03983),
    or constant, or constant with a linear fall to `min_lr` over the last `cooldown` steps
    ("warmup, stable, decay": Hu et al., arXiv 2404.06395).
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        left = total - step
        if left >= schedule.cooldown:
            return peak
        return schedule.min_lr + (peak - schedule.min_lr) * left / schedule.cooldown
    progress = (step - schedule.warmup) / (total - schedule.warmup)
    return schedule.min_lr + (peak - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2
