"""Work on many shards in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def parallel_map(
    work: Callable[[Any], Result], items: Sequence[Any], workers: int, chunksize: int = 1
) -> Iterator[Result]:
    """Yield `work(item)` of each in order; processes take `chunksize` at a time. One worker is
    this process."""
    if workers <= 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as processes:
        yield from processes.map(work, items, chunksize=chunksize)
