"""What counts as one request to stop, and what ends a process at once."""

import os
import signal
import time

import pytest

from parallel_clip.training import stop
from parallel_clip.training.stop import REASONS, StopRequests


class Exited(BaseException):
    pass


def _exit(code):
    raise Exited(code)


@pytest.fixture
def requests(monkeypatch):
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    found = StopRequests(exit_at_once=_exit)
    found.install()
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def reasons(requests: StopRequests, needed: float = 0.0) -> list[str]:
    return [r for r, asked in zip(REASONS, requests.flags(needed), strict=True) if asked]


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_is_kept(requests, number):
    assert reasons(requests) == []
    os.kill(os.getpid(), number)
    assert reasons(requests) == [f"signal:{number.name}"]


def test_signals_within_seconds_are_one(requests, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    now += 4.9
    os.kill(os.getpid(), signal.SIGTERM)
    assert reasons(requests) == ["signal:SIGTERM", "signal:SIGINT"]
    now += 0.2
    with pytest.raises(Exited) as exited:
        os.kill(os.getpid(), signal.SIGINT)
    assert exited.value.args == (130,)


def test_the_time_limit_counts_what_is_still_needed(requests, monkeypatch):
    monkeypatch.setattr(stop, "process_age", lambda: 100.0)
    requests.time_limit = 160.0
    assert reasons(requests, needed=59.0) == []
    assert reasons(requests, needed=61.0) == ["time_limit"]


def test_a_launcher_that_is_gone(monkeypatch):
    monkeypatch.setattr(os, "getppid", lambda: 1234)
    assert reasons(StopRequests()) == [], "a shell that ends means nothing"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    found = StopRequests()
    assert reasons(found) == []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert reasons(found) == ["signal:SIGHUP: the launcher has ended"]
