"""The bias of the logits at which a sigmoid loss is smallest, for features as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_BATCH = 25.0  # its logarithm: 7e10 pairs
_HALVINGS = 26  # of at most 225, to 3e-6


def measured_bias(loss_at: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """fp32 0-dim, on the device of `scale`; NaN where the loss is not finite.

    loss_at: the loss by the bias, both 0-dim, of B pairs; its gradient has to be the same on all
    ranks that call this, which call it together. scale: the multiplier.

    The loss is convex in the bias, with the slope (Σ sigmoid(logit) - B) / B: it is smallest where
    the B² probabilities add up to the B pairs, that is where they are 1 / B on average. No logit is
    above `scale` or below `-scale` without the bias, so between -scale - log B and scale it is
    found by bisection. (Where next to nothing but the pairs takes part, as with duplicates left
    out, it would be infinite, and is at the upper end.)
    """
    low, high = -scale - _LARGEST_BATCH, scale
    for _ in range(_HALVINGS):
        middle = ((low + high) / 2).requires_grad_()
        with torch.enable_grad():
            loss = loss_at(middle)
        (slope,) = torch.autograd.grad(loss, middle)
        middle = middle.detach()
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return torch.where(loss.detach().isfinite(), (low + high) / 2, torch.nan)
