"""Ends a job in which nothing moves, and says which rank it waits for.

Each rank notes what it is doing (`Progress`). A thread on each looks whether that has changed
within `watchdog.timeout`. The first that finds it has not raises an alarm in the job's store; all
report what they are doing, with their stack. Where any of them has moved lately the others only
wait for it, which is no stall; else all end. A rank that does not report is stopped, or its machine
is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from parallel_clip.engine.device import host_name

STALL_FILE = "stalled.txt"
REPORT_SECONDS = 3.0  # how long the others have to report
QUIET_SECONDS = 5.0  # after an alarm that was false

# Keys in the store, of the n-th alarm.
_ALARM = "watchdog/alarm {n}"
_REPORT = "watchdog/alarm {n}, report of rank {rank}"
_OUTCOME = "watchdog/alarm {n}, outcome"
_STALL, _MOVING = "stall", "moving"

# Where a thread stands that waits for other ranks: torch's collectives, or megatron-core's.
_WAITING = ("/torch/distributed/", "/megatron/core/")


class Progress:
    """What this rank is doing, and since when."""

    def __init__(self) -> None:
        self.step, self.doing, self.moves = 0, "starting", 0
        self.since = time.monotonic()

    def mark(self, doing: str, step: int | None = None) -> None:
        """Called by the training thread at each thing that it begins."""
        self.step = self.step if step is None else step
        self.doing = doing
        self.mark_again()

    def mark_again(self) -> None:
        """Called while one thing goes on, at each part of it that is done."""
        self.moves += 1
        self.since = time.monotonic()


@dataclass(frozen=True)
class Report:
    """What a rank says of itself once a stall was found. waiting: for other ranks; stack: of its
    training thread."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    moves: int
    seconds: float
    waiting: bool
    stack: str

    def __str__(self) -> str:
        state = "waiting for other ranks, " * self.waiting
        return (
            f"rank {self.rank} on {self.host} (process {self.pid}): {state}step {self.step}, "
            f"{self.doing}, for {self.seconds:.0f} s"
        )


class Watchdog:
    """Watches this rank's progress on a thread. Made by all ranks.

    store: the job's, None in a world of one; folder: where the stacks are written; on_stall: called
    with the message before the rank that found the stall ends.
    """

    def __init__(
        self,
        progress: Progress,
        timeout: float,
        rank: int,
        world: int,
        store: dist.Store | None,
        folder: Path,
        on_stall: Callable[[str], None] = lambda message: None,
        exit_process: Callable[[int], NoReturn] = os._exit,
    ):
        self._progress = progress
        self._timeout = timeout
        self._rank = rank
        self._world = world
        self._store = store
        self._folder = folder
        self._on_stall = on_stall
        self._exit = exit_process
        self._training_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._poll = min(1.0, timeout / 10)
        self._quiet_until = 0.0
        self._alarm = 0  # the number of the next one

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()
        if self._store is not None:
            threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _has_stalled(self, longer_by: float = 0.0) -> bool:
        now = time.monotonic()
        since = max(self._progress.since, self._quiet_until - self._timeout)
        return now - since > self._timeout + longer_by

    def _watch(self) -> None:
        """End a world of one that has stalled, or a rank whose store does not answer: a request to
        a store in a stopped process never returns, and `_listen` with it."""
        answer_seconds = 0.0 if self._store is None else REPORT_SECONDS + 1
        while not self._stopped.wait(self._poll):
            if not self._has_stalled(answer_seconds):
                continue
            if self._store is None:
                self._tell([self.report()])
            self._finish(
                f"{self.report()}. The job's store does not answer: rank 0, or the launcher that "
                "holds it, is stopped or its machine is gone"
            )

    def _listen(self) -> None:
        """Raise an alarm where this rank has stalled; answer those of all ranks."""
        try:
            while not self._stopped.wait(self._poll):
                alarm = _ALARM.format(n=self._alarm)
                if self._has_stalled():
                    self._store.compare_set(alarm, "", str(self._rank))
                if self._store.check([alarm]):
                    self._answer(raised_here=self._store.get(alarm).decode() == str(self._rank))
        except RuntimeError:  # the store is gone, and with it the job
            return

    def _answer(self, raised_here: bool) -> None:
        """Report to an alarm; who raised it decides what it was."""
        number, self._alarm = self._alarm, self._alarm + 1
        report = json.dumps(asdict(self.report()))
        self._store.set(_REPORT.format(n=number, rank=self._rank), report)
        outcome = _OUTCOME.format(n=number)
        if raised_here:
            keys = [_REPORT.format(n=number, rank=rank) for rank in range(self._world)]
            self._wait_for(keys, REPORT_SECONDS)
            found = [self._store.get(key) for key in keys if self._store.check([key])]
            reports = [Report(**json.loads(report)) for report in found]
            if all(report.seconds > self._timeout / 2 for report in reports):
                self._tell(reports, outcome)
            self._store.set(outcome, _MOVING)
        elif not self._wait_for([outcome], REPORT_SECONDS + 4):
            self._finish(f"{self.report()}. The rank that raised the alarm does not answer")
        elif self._store.get(outcome).decode() == _STALL:
            self._exit(1)
        self._quiet_until = time.monotonic() + QUIET_SECONDS

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def report(self) -> Report:
        progress = self._progress
        frames = traceback.extract_stack(sys._current_frames()[self._training_thread])
        innermost = frames[-1].filename
        return Report(
            self._rank,
            host_name(),
            os.getpid(),
            progress.step,
            progress.doing,
            progress.moves,
            round(time.monotonic() - progress.since, 1),
            any(place in innermost for place in _WAITING),
            "".join(traceback.format_list(frames)),
        )

    def _tell(self, reports: list[Report], outcome: str | None = None) -> NoReturn:
        stacks = "\n".join(f"{report}\n{report.stack}" for report in reports)
        message = diagnosis(reports, self._world)
        file = self._folder / STALL_FILE
        if _done_in_time(lambda: file.write_text(f"{message}\n\n{stacks}")):
            message += f"\nThe stack of every rank that answered is in {file}"
        else:
            message += f"\n{stacks}"
        self._finish(message, outcome)

    def _finish(self, message: str, outcome: str | None = None) -> NoReturn:
        _done_in_time(lambda: self._on_stall(message))
        text = f"parallel-clip: no progress for watchdog.timeout {self._timeout:g} s: {message}\n"
        os.write(sys.stderr.fileno(), text.encode())
        if outcome is not None:
            self._store.set(outcome, _STALL)
        self._exit(1)


def _done_in_time(write: Callable[[], object], seconds: float = 1.0) -> bool:
    """Whether `write` has succeeded: the file system may be what has stalled."""
    done = threading.Event()

    def run() -> None:
        with suppress(OSError):
            write()
            done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(seconds)


def diagnosis(reports: list[Report], world: int) -> str:
    """Which rank the others wait for, in words: one that does not answer; else one that does
    something of its own; else those that are at another place than most."""
    silent = sorted(set(range(world)) - {report.rank for report in reports})
    if silent:
        names = ", ".join(map(str, silent))
        lines = [
            f"rank{'s' * (len(silent) > 1)} {names} do{'es' * (len(silent) == 1)} not answer: "
            "stopped, or the machine is gone. The others:"
        ]
        return "\n  ".join([*lines, *map(str, sorted(reports, key=lambda r: r.rank))])
    suspects = [report for report in reports if not report.waiting]
    if not suspects:
        places = [(report.step, report.doing) for report in reports]
        fewest = min(places.count(place) for place in places)
        suspects = [
            r for r, place in zip(reports, places, strict=True) if places.count(place) == fewest
        ]
    if len(suspects) == world > 1:
        suspects = [report for report in reports if report.moves == min(r.moves for r in reports)]
    others = [report for report in reports if report not in suspects]
    lines = [str(report) for report in suspects]
    if others:
        lines += ["the others:", *map(str, others)]
    return "\n  ".join(lines)
