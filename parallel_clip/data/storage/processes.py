"""Work on many shards in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def parallel_map(
    work: Callable[..., Result], *arguments: Iterable[Any], workers: int, chunksize: int = 1
) -> Iterator[Result]:
    """`map(work, *arguments)` in several processes, each of which takes `chunksize` at a time. One
    worker is this process."""
    if workers <= 1:
        yield from map(work, *arguments)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as processes:
        yield from processes.map(work, *arguments, chunksize=chunksize)
