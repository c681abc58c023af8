"""Work on many shards in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from parallel_clip.errors import WorkerError

Result = TypeVar("Result")


def parallel_map(
    work: Callable[..., Result], *arguments: Iterable[Any], workers: int
) -> Iterator[Result]:
    """`map(work, *arguments)` in several processes, which are at most `workers` items ahead of what
    has been taken. One worker is this process.

    Ctrl-C is for this process alone; where it stops, for whatever reason, the others are killed.
    Raises WorkerError where one of them has ended.
    """
    if workers <= 1:
        yield from map(work, *arguments)
        return
    items = zip(*arguments, strict=True)
    before = {process.pid for process in multiprocessing.active_children()}
    done = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as processes:
        try:
            begun = deque(_submit(processes, work, item) for item in islice(items, 2 * workers))
            while begun:
                yield begun.popleft().result()
                done += 1
                begun.extend(_submit(processes, work, item) for item in islice(items, 1))
        except BaseException as error:
            # Not left to the executor, which waits until each process has ended what it is at.
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    process.kill()
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    f"one of {workers} worker processes was killed, after {done:,} shards. Where "
                    "memory ran out, take fewer (--workers)"
                ) from None
            raise


def _submit(
    processes: ProcessPoolExecutor, work: Callable[..., Result], item: tuple
) -> Future[Result]:
    # The processes start at the first one and inherit what is blocked. Ctrl-C goes to all processes
    # of a terminal, and each would print its traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return processes.submit(work, *item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
