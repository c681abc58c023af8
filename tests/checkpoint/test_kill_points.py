"""kill -9 before and after every operation of a save, and in the middle of every write: the old or
the new checkpoint is there, whole, and the step can be saved again."""

from __future__ import annotations

import errno
import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from parallel_clip.checkpoint import commit, durable
from tests.checkpoint.saving import content, save

OPERATIONS = [
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "fsync"),
    (durable, "exchange"),
    (durable, "remove_folder"),
]


class Watched:
    """Counts the operations of a save, and does something before one of them, counted from 1: what
    lies on the disk after one is what lies there before the next."""

    def __init__(self, at: int | None = None, do: Callable = lambda: None):
        self.at, self.do = at, do
        self.count = 0

    def next_operation(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.do()

    def __enter__(self) -> Watched:
        watched = self

        def counting(function: Callable) -> Callable:
            def operation(*args, **kwargs):
                watched.next_operation()
                return function(*args, **kwargs)

            return operation

        class HalfFile(io.FileIO):
            def write(self, data) -> int:
                view = memoryview(data).cast("B")
                half = len(view) // 2
                watched.next_operation()
                super().write(view[:half])
                watched.next_operation()
                return half + super().write(view[half:])

        def half_open(path: Path, mode: str = "r", *args, **kwargs):
            return HalfFile(path, mode) if mode == "xb" else open(path, mode, *args, **kwargs)

        self._patches = [
            mock.patch.object(owner, name, counting(getattr(owner, name)))
            for owner, name in OPERATIONS
        ] + [mock.patch.object(Path, "open", half_open)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function: Callable[[], None]) -> int:
    """Run `function` in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


# What is there before, what is saved, and what may be found after a kill: (step, value).
CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], object], set]] = {
    "the first": (lambda run: None, lambda run: save(run, 10, 1.0), {None, (10, 1.0)}),
    "the next": (
        lambda run: save(run, 10, 1.0),
        lambda run: save(run, 20, 2.0, keep=1),
        {(10, 1.0), (20, 2.0)},
    ),
    "the same step": (
        lambda run: save(run, 10, 1.0),
        lambda run: save(run, 10, 2.0),
        {(10, 1.0), (10, 2.0)},
    ),
}


def moments(case: str, folder: Path) -> Iterator[tuple[Path, int]]:
    """Each operation of a save, with a run folder of its own."""
    before, saving, _ = CASES[case]
    whole = folder / "whole"
    whole.mkdir()
    before(whole)
    with Watched() as watched:
        saving(whole)
    assert watched.count > 20
    for number in range(1, watched.count + 1):
        run = folder / str(number)
        run.mkdir()
        before(run)
        yield run, number


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """In memory, where flushing takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def newest(run: Path) -> tuple[int, float] | None:
    folder = commit.latest(run)
    return None if folder is None else content(folder)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("case", CASES)
def test_a_kill_leaves_the_old_or_the_new(memory_folder, case, exchanges):
    _, saving, allowed = CASES[case]
    found = set()
    with mock.patch.object(
        durable, "exchange", durable.exchange if exchanges else lambda *_: False
    ):
        for run, number in moments(case, memory_folder):

            def child(run=run, number=number):
                with Watched(number, kill_self):
                    saving(run)

            assert os.WTERMSIG(in_child(child)) == signal.SIGKILL, number
            found.add(newest(run))
            assert found <= allowed, number
            commit.clean(run)  # what the next start does
            assert newest(run) in allowed
            assert list((run / "checkpoints").glob(".*")) == []
            saving(run)
            assert newest(run) is not None
    assert found == allowed, "some outcome never came"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_leaves_the_old_or_the_new(memory_folder, code):
    _, saving, allowed = CASES["the same step"]

    def fail():
        raise OSError(code, os.strerror(code))

    for run, number in moments("the same step", memory_folder):
        with Watched(number, fail), pytest.raises(OSError, match=os.strerror(code)):
            saving(run)
        assert newest(run) in allowed
        commit.clean(run)
        save(run, 10, 3.0)
        assert newest(run) == (10, 3.0)
