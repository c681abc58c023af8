"""Progress of long work over shards: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Print = Callable[[str], None]  # where lines for people go: `print`, `print_nothing`, a test's list
Value = TypeVar("Value")

_SECONDS_BETWEEN_LINES = 10


def show_progress(
    results: Iterable[Value], total: int, doing: str, say: Print, unit: str = "shards"
) -> Iterator[Value]:
    """Yield `results`, of which there will be `total`, and show how many have come.

    doing: the past participle in the line, such as "indexed"; unit: what is counted.
    """
    if say is print and sys.stdout.isatty():
        from rich.progress import track

        yield from track(results, description=doing, total=total)
        return
    began = last = time.monotonic()
    for number, result in enumerate(results, 1):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - began) / number * (total - number)
            say(f"{doing} {number:,} of {total:,} {unit}, {left:,.0f} s left")
        yield result


def print_nothing(_: str) -> None:
    """A `Print` that drops its line."""
