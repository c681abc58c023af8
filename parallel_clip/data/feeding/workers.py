"""Worker processes that read ahead; one that is killed or stuck is an error that names its sample.

A worker writes what it is about to read to memory that it shares with the rank's process. When its
next batch does not come, that process looks there how long the worker has been at it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from parallel_clip.data.storage.addresses import beat_while_waiting
from parallel_clip.errors import BadDataError, InputError, WorkerError

_SECONDS_BETWEEN_LOOKS = 5
_PID, _BUSY, _SINCE = range(3)  # of a worker's row; behind them the numbers of its position
_POSITION_NUMBERS = 3
_ROW = _SINCE + 1 + _POSITION_NUMBERS
_FORK = multiprocessing.get_context("fork")


class _Flag:
    """An event between processes without a lock, which a worker that is killed could hold: torch
    would wait for it forever when it ends the others."""

    def __init__(self):
        self._value = _FORK.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


class _ForkWithFlags(type(_FORK)):
    def Event(self) -> _Flag:  # noqa: N802  (multiprocessing's name)
        return _Flag()


_FORK_WITH_FLAGS = _ForkWithFlags()
_ENDS = (BadDataError, InputError, WorkerError)
# What torch and multiprocessing raise where a worker dies while it hands its tensors over, and
# torch of its own accord.
_HANDING_OVER_FAILED = (RuntimeError, OSError, EOFError, multiprocessing.ProcessError)
_SECONDS_TO_DIE = 2  # of a worker that no longer answers, on a busy machine

_own_row: memoryview | None = None  # in a worker
# In the rank's process: of those that read now, as an evaluation does beside training.
_monitors: list[WorkerMonitor] = []


class WatchedData(Protocol):
    """Data that workers read."""

    def __getitem__(self, item: object) -> object: ...

    def describe_position(self, *numbers: int) -> str:
        """In words for people, what `report_progress(*numbers)` said."""


def report_progress(*numbers: int) -> None:
    """Called by data, at least once a sample, with the numbers of what it is about to read (at most
    three); does nothing outside a worker."""
    if _own_row is not None:
        for number, value in enumerate(numbers):
            _own_row[_SINCE + 1 + number] = value
        _own_row[_SINCE] = time.monotonic()


def heartbeat() -> None:
    """Called while a request to a store is under way, which waits and is not stuck."""
    if _own_row is not None:
        _own_row[_SINCE] = time.monotonic()


def read_ahead(
    data: WatchedData,
    items: Iterable,
    workers: int,
    prefetch: int,
    pin: bool = False,
    patience: float = 25.0,
) -> Iterator:
    """Yield `data[item]` of each item in order, read by `workers` processes (0: this one).

    prefetch: items that each worker keeps ready; pin: hand them out in page-locked memory;
    patience: seconds that a worker may take over one sample. Workers start with the first item and
    end when the iterator is closed or exhausted.

    Raises:
        WorkerError: a worker has ended, or has been at one sample for `patience` seconds, or the
            file system fails.
        BadDataError, InputError: as `data[item]` does.
    """
    monitor = WorkerMonitor(data, workers, patience) if workers else None
    loader = DataLoader(
        _FailuresAsValues(data),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        # Forked, workers share the tables of shards with the trainer, whatever Python's default is.
        multiprocessing_context=_FORK_WITH_FLAGS if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        collate_fn=lambda value: value,
        generator=torch.Generator(),
        worker_init_fn=monitor.begin_in_worker if monitor else None,
        timeout=_SECONDS_BETWEEN_LOOKS if monitor else 0,
    )
    if monitor:
        # One that has ended is kept until the next begins: its workers' end may yet be reported.
        _monitors[:] = [other for other in _monitors if other.running] + [monitor]
    values = iter(loader)
    if monitor:
        monitor.watch(values)
    try:
        while True:
            try:
                value = next(values)
            except StopIteration:
                return
            except _HANDING_OVER_FAILED as error:
                if monitor is None:
                    raise
                monitor.check_workers(error)
                continue
            if isinstance(value, _ENDS):
                raise value
            yield value
    finally:
        if monitor:
            # Not left to garbage collection: an error on its way refers to the iterator.
            values._shutdown_workers()
            monitor.kill_rest()
            monitor.running = False


def worker_failure(error: Exception) -> str | None:
    """How a worker ended, in words, if `error` is torch's that says so; else None.

    torch raises it wherever the process is when it learns of it.
    """
    ended = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)", str(error))
    if ended is None or not _monitors or not isinstance(error, RuntimeError):
        return None
    pid = int(ended[1].split(",")[0])
    by_signal = re.search(r"killed by signal: ([\w ]+)", str(error))
    how = f"was killed ({by_signal[1].strip()})" if by_signal else None
    monitor = next((m for m in _monitors if any(row[_PID] == pid for row in m.rows())), None)
    return (monitor or _monitors[-1]).describe_end(pid, how)


class WorkerMonitor:
    """What the workers of one `read_ahead` are reading, in memory that they share."""

    def __init__(self, data: WatchedData, workers: int, patience: float):
        self._data = data
        self._patience = patience
        self.running = True
        self._memory = _FORK.RawArray("d", workers * _ROW)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pinning: threading.Thread | None = None

    def watch(self, values: Iterator) -> None:
        """Called with torch's iterator, when it has started the workers."""
        self._processes = list(values._workers)
        self._pinning = getattr(values, "_pin_memory_thread", None)

    def begin_in_worker(self, number: int) -> None:
        """Called first in each worker."""
        global _own_row
        # A job that is told to end may still write a checkpoint; its workers end when it does.
        for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(ignored, signal.SIG_IGN)
        sys.excepthook = _hide_lost_connection
        _monitors.clear()
        start = number * _ROW
        _own_row = memoryview(self._memory).cast("B").cast("d")[start : start + _ROW]
        _own_row[_PID] = os.getpid()
        beat_while_waiting(heartbeat)

    def check_workers(self, error: Exception) -> None:
        """Raise WorkerError if one has ended or is stuck, after torch's or multiprocessing's
        `error` over a batch that has not come; `error` itself if it is neither that nor a
        time-out."""
        timed_out = "timed out" in str(error)
        failure = worker_failure(error)
        try:
            failure = failure or self._find_ended(0 if timed_out else _SECONDS_TO_DIE)
        except RuntimeError as later:  # torch hears of it only now
            failure = worker_failure(later)
        if failure is not None:
            raise WorkerError(failure) from None
        if not timed_out:
            raise error
        if self._pinning is not None and not self._pinning.is_alive():
            raise WorkerError(
                "the thread that copies batches to page-locked memory has ended; its error is above"
            )
        for row in self.rows():
            waited = time.monotonic() - row[_SINCE]
            if row[_BUSY] and waited > self._patience:
                raise WorkerError(
                    f"data worker {row[_PID]:.0f} is stuck: for {waited:.0f} s at "
                    f"{self.position(row)}. See whether that file can be read; "
                    "data.worker_patience is how long a worker may take over one sample"
                )

    def _find_ended(self, seconds: float) -> str | None:
        """How a worker has ended, or does within `seconds`, in words; None: none has."""
        until = time.monotonic() + seconds
        while True:
            for process in self._processes:
                if process.exitcode is not None:
                    return self.describe_end(process.pid)
            if time.monotonic() >= until:
                return None
            time.sleep(0.02)

    def describe_end(self, pid: int, how: str | None = None) -> str:
        """What happened to worker `pid`, where, and what to do; how: None to look it up."""
        codes = (process.exitcode for process in self._processes if process.pid == pid)
        code = next(codes, None)
        if how is None and code is not None and code < 0:
            how = f"was killed ({signal.strsignal(-code)})"
        at = next((f" at {self.position(row)}" for row in self.rows() if row[_PID] == pid), "")
        return (
            f"data worker {pid} {how or 'has ended'}{at}. Where memory ran out, lower "
            "data.workers or data.prefetch; where shared memory did, give the container more "
            "(--ipc=host)"
        )

    def kill_rest(self) -> None:
        """Kill the workers that still live: they ignore SIGTERM, and one may be stuck."""
        pids = {int(row[_PID]) for row in self.rows()}
        for process in multiprocessing.active_children():
            if process.pid in pids:
                process.kill()
                process.join(1)

    def rows(self) -> list[list[float]]:
        """What each worker has written."""
        values = list(self._memory)
        return [values[i : i + _ROW] for i in range(0, len(values), _ROW)]

    def position(self, row: list[float]) -> str:
        return self._data.describe_position(*(int(number) for number in row[_SINCE + 1 :]))


def _hide_lost_connection(kind: type[BaseException], error: BaseException, trace) -> None:
    """In a worker, whose threads hand tensors over: where the rank's process stops in the midst of
    it, as for another worker's death, that process says why."""
    if not isinstance(error, ConnectionError):
        sys.__excepthook__(kind, error, trace)


class _FailuresAsValues(Dataset):
    """Data that returns an error instead of raising it: a DataLoader would add the worker's
    traceback to its message."""

    def __init__(self, data: WatchedData):
        self._data = data

    def __getitem__(self, item: object) -> object:
        if _own_row is not None:
            _own_row[_SINCE] = time.monotonic()
            _own_row[_BUSY] = 1
        try:
            return self._data[item]
        except _ENDS as error:
            return error
        except OSError as error:
            return WorkerError(f"a shard cannot be read: {error}")
        finally:
            if _own_row is not None:
                _own_row[_BUSY] = 0
