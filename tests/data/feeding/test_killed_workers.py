"""Workers that are killed while they hand tensors over: one sentence says so, whatever fails."""

import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch
from torch.multiprocessing import reductions

from parallel_clip.data.feeding import workers
from parallel_clip.data.feeding.workers import read_ahead, report_progress, worker_failure
from parallel_clip.errors import WorkerError


class Tensors:
    """Items that are handed over through shared memory, in parts."""

    def __getitem__(self, item):
        report_progress(item)
        return [torch.full((4096,), item, dtype=torch.int32) for _ in range(8)]

    def describe_position(self, item, *_):
        return f"item {item}"


def kill_one_of(pids, seconds=0.0):
    """Kill a process `seconds` from now."""
    threading.Timer(seconds, lambda: os.kill(pids[0], signal.SIGKILL)).start()


def new_children(before):
    return [p.pid for p in multiprocessing.active_children() if p.pid not in before]


def sentence(error: Exception) -> str | None:
    """As the command prints it: torch may speak up first."""
    return str(error) if isinstance(error, WorkerError) else worker_failure(error)


def test_kills_at_any_moment_end_with_the_sentence(capfd):
    chance = random.Random(0)
    before = {process.pid for process in multiprocessing.active_children()}
    for _ in range(30):
        values = read_ahead(Tensors(), range(10**6), 2, 2)
        assert [next(values)[0][0] for _ in range(2)] == [0, 1]  # both have begun
        pids = new_children(before)
        assert len(pids) == 2
        chance.shuffle(pids)
        kill_one_of(pids, chance.uniform(0, 0.03))
        began = time.monotonic()
        with pytest.raises(Exception) as caught:
            for number, value in enumerate(values, 2):
                assert len(value) == 8 and value[7][4095] == number
        values.close()
        assert time.monotonic() - began < 10
        assert f"data worker {pids[0]} was killed (Killed) at item " in sentence(caught.value)
        assert not new_children(before)
    assert "Traceback" not in capfd.readouterr().err


FAILURES = [
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError(2, "No such file or directory"),
    EOFError(),
    RuntimeError("received 0 items of ancdata"),
    multiprocessing.AuthenticationError("digest received was wrong"),
]
_failure: list[Exception] = []  # what the next handing over raises
_seconds: list[float] = []  # until a worker is killed; empty: none is
_others: set[int] = set()


def broken_handover(cls, df, size):
    """In place of torch's `rebuild_storage_fd`."""
    if _seconds:
        kill_one_of(new_children(_others), _seconds.pop())
    raise _failure[0]


@pytest.fixture
def handover(monkeypatch):
    monkeypatch.setattr(reductions, "rebuild_storage_fd", broken_handover)
    _others.update(process.pid for process in multiprocessing.active_children())
    yield
    _failure.clear(), _seconds.clear(), _others.clear()


@pytest.mark.parametrize("torch_hears", [True, False])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_the_connection_says_is_not_what_is_told(handover, monkeypatch, error, torch_hears):
    """The worker's end is noticed a little after the connection's."""
    if not torch_hears:
        monkeypatch.setattr(
            torch.utils.data._utils.signal_handling, "_error_if_any_worker_fails", int
        )
    _failure.append(error)
    _seconds.append(0.3)
    values = read_ahead(Tensors(), range(100), 1, 1)
    with pytest.raises(Exception) as caught:
        next(values)
    assert "was killed (Killed) at item " in sentence(caught.value)
    if not torch_hears:
        assert isinstance(caught.value, WorkerError)


def test_a_failure_while_all_workers_live_stays_what_it_is(handover, monkeypatch):
    monkeypatch.setattr(workers, "_SECONDS_TO_DIE", 0.1)
    _failure.append(FAILURES[0])
    with pytest.raises(ConnectionResetError, match="reset by peer") as caught:
        next(read_ahead(Tensors(), range(100), 1, 1))
    assert worker_failure(caught.value) is None
    assert not new_children(_others)


def test_a_death_that_torch_does_not_hear_of_is_found_at_its_next_time_out(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_error_if_any_worker_fails", int)
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_LOOKS", 1)
    before = {process.pid for process in multiprocessing.active_children()}
    values = read_ahead(Tensors(), range(100), 1, 1)
    next(values)
    (pid,) = new_children(before)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"data worker {pid} was killed \(Killed\) at item "):
        list(values)
