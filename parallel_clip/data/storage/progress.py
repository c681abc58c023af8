"""How far a long look at shards has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Print = Callable[[str], None]
Value = TypeVar("Value")

_SECONDS_BETWEEN_LINES = 10


def show_progress(
    results: Iterable[Value], total: int, doing: str, say: Print, unit: str = "shards"
) -> Iterator[Value]:
    """Hand on `results`, of which there will be `total`; `doing` is such as "indexed"."""
    if say is print and sys.stdout.isatty():
        from rich.progress import show_progress as bar

        yield from bar(results, description=doing, total=total)
        return
    began = last = time.monotonic()
    for number, result in enumerate(results, 1):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - began) / number * (total - number)
            say(f"{doing} {number:,} of {total:,} {unit}, {left:,.0f} s left")
        yield result
