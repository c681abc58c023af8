"""Workers that are killed, get stuck, fail, or are told to end."""

import multiprocessing
import os
import signal
import time

import pytest

from parallel_clip.data.feeding.workers import (
    heartbeat,
    read_ahead,
    report_progress,
    worker_failure,
)
from parallel_clip.errors import BadDataError, InputError, WorkerError


class Data:
    """Items are numbers; some make something happen first."""

    def __init__(self, **happenings):
        self._happenings = happenings

    def __getitem__(self, item):
        report_progress(7, item)
        happening = self._happenings.get(f"at_{item}")
        if happening is not None:
            happening()
        return item

    def describe_position(self, source, item, *_):
        return f"item {item} of source {source}"


def killed():
    time.sleep(0.3)  # what came before is handed on first
    os.kill(os.getpid(), signal.SIGKILL)


def stuck():
    time.sleep(600)


def slow():
    for _ in range(8):
        time.sleep(1)
        heartbeat()


@pytest.fixture
def left_behind():
    """The processes that live now and did not before; other tests keep some."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


def test_a_worker_that_is_killed_is_named_with_its_place(left_behind):
    began = time.monotonic()
    with pytest.raises((WorkerError, RuntimeError)) as caught:
        list(read_ahead(Data(at_5=killed), range(9), 2, 1))
    message = str(caught.value)
    if not isinstance(caught.value, WorkerError):  # torch spoke up first: as the command does
        message = worker_failure(caught.value)
    assert "data worker" in message and "was killed" in message or "has ended" in message
    assert "at item 5 of source 7" in message and "lower data.workers" in message
    assert time.monotonic() - began < 30
    assert not left_behind()


def test_a_worker_that_is_stuck_is_named_with_its_place_and_ended(left_behind):
    began = time.monotonic()
    values = read_ahead(Data(at_3=stuck), range(9), 2, 1, patience=2)
    with pytest.raises(WorkerError, match="is stuck: for .* s at item 3 of source 7"):
        assert [next(values) for _ in range(9)]
    assert time.monotonic() - began < 30
    time.sleep(0.2)
    assert not left_behind()


def test_a_worker_that_waits_and_says_so_is_not_stuck():
    assert list(read_ahead(Data(at_1=slow), range(3), 1, 1, patience=3)) == [0, 1, 2]


def test_workers_do_not_hear_sigterm():
    """A job that is told to end may still write a checkpoint."""
    values = read_ahead(Data(at_2=lambda: os.kill(os.getpid(), signal.SIGTERM)), range(5), 2, 1)
    assert list(values) == [0, 1, 2, 3, 4]


def fail(error):
    def happening():
        raise error

    return happening


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error, kind",
    [
        (BadDataError("bad"), BadDataError),
        (InputError("wrong"), InputError),
        (OSError(5, "Input/output error", "a.tar"), WorkerError),
    ],
)
def test_errors_come_as_they_are(workers, error, kind):
    with pytest.raises(kind) as caught:
        list(read_ahead(Data(at_1=fail(error)), range(3), workers, 1))
    assert "Traceback" not in str(caught.value)
    assert str(error) in str(caught.value)


def test_what_is_left_early_leaves_no_process(left_behind):
    values = read_ahead(Data(), range(100), 2, 1)
    assert next(values) == 0
    values.close()
    assert not left_behind()


def test_reading_without_workers_in_between_leaves_the_others_watched():
    """As an evaluation does in the middle of a training."""
    values = read_ahead(Data(at_5=killed), range(9), 1, 1)
    assert next(values) == 0
    assert list(read_ahead(Data(), range(3), 0, 1)) == [0, 1, 2]
    with pytest.raises((WorkerError, RuntimeError)) as caught:
        list(values)
    message = str(caught.value)
    if not isinstance(caught.value, WorkerError):
        message = worker_failure(caught.value)
    assert "data worker" in message and "at item 5 of source 7" in message


@pytest.mark.parametrize("killed_by", ["training", "evaluation"])
def test_workers_of_an_evaluation_are_watched_beside_those_of_training(killed_by):
    training = read_ahead(Data(at_5=killed), range(9), 1, 1)
    assert next(training) == 0
    happenings = {"at_2": killed} if killed_by == "evaluation" else {}

    def read() -> None:
        list(read_ahead(Data(**happenings), range(100, 103) if not happenings else range(3), 1, 1))
        list(training)

    with pytest.raises((WorkerError, RuntimeError)) as caught:
        read()
    message = str(caught.value)
    if not isinstance(caught.value, WorkerError):
        message = worker_failure(caught.value)
    item = 2 if happenings else 5
    assert f"at item {item} of source 7" in message
    training.close()
