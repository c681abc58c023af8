"""Requests to stop that a process has had: signals, the end of its time, a launcher that is gone.

Nothing is done at once. All ranks learn of it before the same step (`TrainingLoop`), save there and
end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from parallel_clip.engine.process import process_age

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = (
    *(f"signal:{number.name}" for number in SIGNALS),
    "signal:SIGHUP: the launcher has ended",
    "time_limit",
)
_LAUNCHER, _TIME = len(SIGNALS), len(SIGNALS) + 1

# One scancel or Ctrl-C arrives several times: from the launcher, the scheduler and the terminal.
SAME_REQUEST_SECONDS = 5.0


class StopRequests:
    """What this process has been asked since `install`.

    say: whether this process tells of signals, of which all ranks get the same. time_limit: seconds
    from the start of this process, at which it has to have ended; None: none.
    """

    def __init__(self, say: bool = True, exit_at_once: Callable[[int], NoReturn] = os._exit):
        self.time_limit: float | None = None
        self._say = say
        self._exit = exit_at_once
        self._asked: dict[int, float] = {}  # place in REASONS: when, by the monotonic clock
        # torchrun's agent is the parent; a shell that has ended (nohup) means nothing.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def flags(self, needed_seconds: float) -> list[int]:
        """For each of REASONS 1 where it holds for this process, else 0.

        needed_seconds: what one more step and a save would take.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self._asked.setdefault(_LAUNCHER, time.monotonic())
        if self.time_limit is not None and process_age() + needed_seconds > self.time_limit:
            self._asked.setdefault(_TIME, time.monotonic())
        return [int(place in self._asked) for place in range(len(REASONS))]

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        first = min(self._asked.values(), default=now)
        self._asked.setdefault(SIGNALS.index(signal.Signals(number)), now)
        name = signal.Signals(number).name
        if now - first > SAME_REQUEST_SECONDS:
            self._print(f"{name} again: ending at once, without saving")
            self._exit(128 + number)
        if now == first:
            self._print(f"{name}: saving before the next step, then ending")

    def _print(self, message: str) -> None:
        """Print past sys.stderr's buffer, which the code that was interrupted may be writing to."""
        if self._say:
            os.write(sys.stderr.fileno(), f"parallel-clip: {message}\n".encode())
