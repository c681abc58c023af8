"""Steps whose loss or gradient is not finite, or whose gradient is far larger than usual."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from parallel_clip.config import BadSteps as BadStepSettings
from parallel_clip.errors import BadStepsError

ENOUGH_STEPS = 10  # good steps from which on a median says something


class BadStepPolicy:
    """Tells bad steps from good ones, and ends the run where there are too many. The same on every
    rank, as it is asked about values that are.

    grad_norms: of the last `window` good steps; skipped: the bad steps, of the last `window`.
    """

    def __init__(
        self,
        settings: BadStepSettings,
        grad_norms: tuple[float, ...] = (),
        skipped: tuple[int, ...] = (),
    ):
        self._settings = settings
        self.grad_norms = deque(grad_norms, maxlen=settings.window)
        self.skipped = list(skipped)

    def complaint(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, before its update; None: nothing. grad_norm: unclipped."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.4g})"
        spike, enough = self._settings.spike, min(ENOUGH_STEPS, self._settings.window)
        if spike is not None and len(self.grad_norms) >= enough:
            usual = median(self.grad_norms)
            if grad_norm > spike * usual:
                return (
                    f"the gradient norm {grad_norm:.4g} is more than bad_steps.spike {spike:g} "
                    f"times the usual {usual:.4g}"
                )
        return None

    def count_good(self, grad_norm: float) -> None:
        self.grad_norms.append(grad_norm)

    def count_bad(self, step: int, complaint: str) -> None:
        """Count a step that was not done.

        Raises:
            BadStepsError: `bad_steps` does not allow it.
        """
        settings = self._settings
        if settings.action == "halt":
            raise BadStepsError(
                f"step {step}: {complaint}; the weights are those of step {step - 1}, not saved. "
                "bad_steps.action=skip leaves such steps out"
            )
        self.skipped = [s for s in self.skipped if s > step - settings.window] + [step]
        if len(self.skipped) > settings.limit:
            raise BadStepsError(
                f"step {step}: {complaint}; this is bad step {len(self.skipped)} of the last "
                f"{settings.window}, and bad_steps.limit is {settings.limit}"
            )
