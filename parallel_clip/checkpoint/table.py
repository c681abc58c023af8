"""Print checkpoints as a table."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from parallel_clip.checkpoint.inspect import CheckpointState, layout_words


def print_checkpoints(states: Sequence[CheckpointState]) -> None:
    table = Table()
    for column in ("step", "size", "data × tensor × pipeline", "age", "state"):
        table.add_column(column, justify="right" if column in ("step", "size", "age") else "left")
    for state in states:
        table.add_row(
            str(state.step),
            "-" if state.bytes is None else f"{state.bytes / 1e9:.3f} GB",
            layout_words(state.layout),
            _age(state.time),
            _words(state) + ("  (latest)" if state.latest else ""),
        )
    console = Console()
    console.print(table)
    for state in states:
        if state.problem is not None:
            console.print(state.problem, soft_wrap=True, markup=False, highlight=False)


def _words(state: CheckpointState) -> str:
    if not state.complete:
        return "not whole"
    return {None: "complete", True: "intact", False: "DAMAGED"}[state.verified]


def _age(time: str | None) -> str:
    if time is None:
        return "-"
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time)
    days, seconds = max(age.days, 0), age.seconds if age.days >= 0 else 0
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
