"""Progress of long work over shards: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
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
        yield from _bar(results, total, doing, unit)
        return
    began = last = time.monotonic()
    for number, result in enumerate(results, 1):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            last = now
            rate = number / (now - began)
            left = timedelta(seconds=round((total - number) / rate))
            say(f"{doing} {number:,} of {total:,} {unit}, {rate:,.3g} a second, {left} left")
        yield result


def _bar(results: Iterable[Value], total: int, doing: str, unit: str) -> Iterator[Value]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeLeft()) as progress:
        task, began = progress.add_task(doing, total=total, rate=""), time.monotonic()
        for number, result in enumerate(results, 1):
            rate = number / max(time.monotonic() - began, 1e-3)
            progress.update(task, completed=number, rate=f"{unit}, {rate:,.3g} a second")
            yield result


def print_nothing(_: str) -> None:
    """A `Print` that drops its line."""
