"""Processes that read ahead, watched: one that is killed or stuck is an error that says where.

A worker notes what it is about to read in memory that it shares with the trainer. When its next
batch does not come, the trainer looks whether the worker still gets on.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from parallel_clip.errors import BadDataError, InputError, WorkerError

_SECONDS_BETWEEN_LOOKS = 5
_PID, _BUSY, _SINCE = range(3)  # of a worker's notes; behind them the numbers that say where
_PLACES = 3
_FORK = multiprocessing.get_context("fork")
_ENDS = (BadDataError, InputError, WorkerError)

_notes: memoryview | None = None  # in a worker: its own
_watch: WorkerMonitor | None = None  # in the trainer: that of its workers


class WatchedData(Protocol):
    """Data that workers read."""

    def __getitem__(self, item: object) -> object: ...

    def describe_position(self, *numbers: int) -> str:
        """In words, what `getting_on(*numbers)` told of."""
        ...


def report_progress(*numbers: int) -> None:
    """To be called by data with what it is about to read, at least once a sample."""
    if _notes is not None:
        for number, value in enumerate(numbers):
            _notes[_SINCE + 1 + number] = value
        _notes[_SINCE] = time.monotonic()


def heartbeat() -> None:
    """To be called by data that waits and is not stuck, such as before a request is made again."""
    if _notes is not None:
        _notes[_SINCE] = time.monotonic()


def read_ahead(
    data: WatchedData,
    items: Iterable,
    workers: int,
    prefetch: int,
    pin: bool = False,
    patience: float = 25.0,
) -> Iterator:
    """`data[item]` of each item in order, by `workers` processes (0: this one), each of which keeps
    `prefetch` of them ready; `pin`: in page-locked memory.

    Raises:
        WorkerError: a worker has ended, or has been at one sample for `patience` seconds, or the
            file system fails.
        BadDataError, InputError: as `data[item]` does.
    """
    global _watch
    watch = WorkerMonitor(data, workers, patience) if workers else None
    loader = DataLoader(
        _FailuresAsValues(data),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        # Forked, workers share the tables of shards with the trainer, whatever Python's default is.
        multiprocessing_context=_FORK if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        worker_init_fn=watch.begin_in_worker if watch else None,
        timeout=_SECONDS_BETWEEN_LOOKS if watch else 0,
    )
    if watch:  # reading without workers, as evaluation does, leaves those of training watched
        _watch = watch
    values = iter(loader)
    try:
        while True:
            try:
                value = next(values)
            except StopIteration:
                return
            except RuntimeError as error:
                if watch is None:
                    raise
                watch.look(error)
                continue
            if isinstance(value, _ENDS):
                raise value
            yield value
    finally:
        if watch:
            # Not left to garbage collection: an error on its way refers to the iterator.
            values._shutdown_workers()
            watch.kill_rest()


def worker_failure(error: Exception) -> str | None:
    """What ended a worker, where that is what `error` says. torch raises it wherever the trainer
    is when it learns of it."""
    ended = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)", str(error))
    if ended is None or _watch is None or not isinstance(error, RuntimeError):
        return None
    return _watch.how_it_ended(int(ended[1].split(",")[0]), str(error))


class WorkerMonitor:
    """The notes of all workers, and what they mean."""

    def __init__(self, data: WatchedData, workers: int, patience: float):
        self._data = data
        self._patience = patience
        self._width = _SINCE + 1 + _PLACES
        self._notes = _FORK.RawArray("d", workers * self._width)

    def begin_in_worker(self, number: int) -> None:
        """A worker's first act."""
        global _notes, _watch
        # A job that is told to end may still write a checkpoint; its workers end when it does.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _watch = None
        start = number * self._width
        _notes = memoryview(self._notes).cast("B").cast("d")[start : start + self._width]
        _notes[_PID] = os.getpid()

    def look(self, error: RuntimeError) -> None:
        """Whether the workers get on, after a batch has not come."""
        failure = worker_failure(error)
        if failure is not None:
            raise WorkerError(failure) from None
        if "timed out" not in str(error):
            raise error
        for row in self._rows():
            waited = time.monotonic() - row[_SINCE]
            if row[_BUSY] and waited > self._patience:
                raise WorkerError(
                    f"data worker {row[_PID]:.0f} is stuck: for {waited:.0f} s at "
                    f"{self._place(row)}. See whether that file can be read; data.worker_patience "
                    "is how long a worker may take over one sample"
                )

    def how_it_ended(self, pid: int, message: str) -> str:
        at = next((f" at {self._place(row)}" for row in self._rows() if row[_PID] == pid), "")
        by_signal = re.search(r"killed by signal: ([\w ]+)", message)
        how = f"was killed ({by_signal[1].strip()})" if by_signal else "has ended"
        return (
            f"data worker {pid} {how}{at}. Where memory ran out, lower data.workers or "
            "data.prefetch; where shared memory did, give the container more (--ipc=host)"
        )

    def kill_rest(self) -> None:
        """They ignore SIGTERM, and one that is stuck hears nothing else."""
        pids = {int(row[_PID]) for row in self._rows()}
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()
                process.join(1)

    def _rows(self) -> list[list[float]]:
        notes = list(self._notes)
        return [notes[i : i + self._width] for i in range(0, len(notes), self._width)]

    def _describe_position(self, row: list[float]) -> str:
        return self._data.describe_position(*(int(number) for number in row[_SINCE + 1 :]))


class _FailuresAsValues(Dataset):
    """Hands an error over as it is: a DataLoader would add a worker's traceback to its message."""

    def __init__(self, data: WatchedData):
        self._data = data

    def __getitem__(self, item: object) -> object:
        if _notes is not None:
            _notes[_SINCE] = time.monotonic()
            _notes[_BUSY] = 1
        try:
            return self._data[item]
        except _ENDS as error:
            return error
        except OSError as error:
            return WorkerError(f"a shard cannot be read: {error}")
        finally:
            if _notes is not None:
                _notes[_BUSY] = 0


def _unchanged(value: object) -> object:
    return value
