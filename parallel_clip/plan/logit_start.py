"""With which multiplier and bias of the logits a run begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel_clip.config import Init


@dataclass(frozen=True)
class LogitStart:
    """What a run begins with in place of what its weights, or its model's JSON, have.

    scale: the multiplier itself, and bias, None where nothing takes their place; measures_bias: the
    bias is found on the first batch (pipeline/measured_bias.py); words: what to tell the user.
    """

    scale: float | None = None
    bias: float | None = None
    measures_bias: bool = False
    words: tuple[str, ...] = ()

    def value(self, name: str) -> float | None:
        """What is given for a parameter of the model, as it holds it: the scale's logarithm."""
        if name == "logit_scale" and self.scale is not None:
            return math.log(self.scale)
        return self.bias if name == "logit_bias" else None


def find_logit_start(init: Init, lacks_bias: bool) -> LogitStart:
    """By `init.logit_scale` and `init.logit_bias`.

    lacks_bias: the weights have a multiplier and no bias, as after InfoNCE, and the model has one.
    No constant is right for all of these: a bias has to undo the multiplier times the usual cosine
    of two that are no pair, and SigLIP's -10 beside a multiplier of 100, or OpenCLIP's 0, makes
    each of B² - B logits a false positive.
    """
    measured = init.logit_bias == "measured" or (init.logit_bias is None and lacks_bias)
    given = init.logit_bias if isinstance(init.logit_bias, float | int) else None
    words = []
    if init.logit_scale is not None:
        words.append(f"logit_scale: {init.logit_scale:g}, by init.logit_scale")
    if given is not None:
        words.append(f"logit_bias: {given:g}, by init.logit_bias")
    if measured:
        why = "init.logit_bias" if init.logit_bias is not None else "the weights have none"
        words.append(f"logit_bias: measured on the first batch ({why})")
    return LogitStart(init.logit_scale, given, measured, tuple(words))
