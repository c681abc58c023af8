"""Work on many shards in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from parallel_clip.errors import WorkerError

Result = TypeVar("Result")


def parallel_map(
    work: Callable[..., Result], *arguments: Iterable[Any], workers: int, chunksize: int = 1
) -> Iterator[Result]:
    """`map(work, *arguments)` in several processes, each of which takes `chunksize` at a time. One
    worker is this process.

    Ctrl-C is for this process alone; where it stops, for whatever reason, the others are killed.
    Raises WorkerError where one of them has ended.
    """
    if workers <= 1:
        yield from map(work, *arguments)
        return
    items = list(zip(*arguments, strict=True))
    chunks = [items[start : start + chunksize] for start in range(0, len(items), chunksize)]
    before = {process.pid for process in multiprocessing.active_children()}
    done = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as processes:
        try:
            futures = _submit(processes, work, chunks)
            while futures:
                for result in futures.popleft().result():
                    yield result
                    done += 1
        except BaseException as error:
            # Not left to the executor, which waits until each process has ended what it is at.
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    process.kill()
            if isinstance(error, BrokenProcessPool):
                raise WorkerError(
                    f"one of {workers} worker processes was killed, after {done:,} of "
                    f"{len(items):,} shards. Where memory ran out, take fewer (--workers)"
                ) from None
            raise


def _submit(
    processes: ProcessPoolExecutor, work: Callable[..., Result], chunks: list[list[tuple]]
) -> deque[Future[list[Result]]]:
    # The processes start here and inherit what is blocked. Ctrl-C goes to all processes of a
    # terminal, and each would print its traceback.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return deque(processes.submit(_work_on, work, chunk) for chunk in chunks)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work_on(work: Callable[..., Result], chunk: list[tuple]) -> list[Result]:
    return [work(*item) for item in chunk]
