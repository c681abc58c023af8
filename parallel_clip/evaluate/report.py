"""Figures of an evaluation for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parallel_clip.errors import InputError


def print_table(title: str, results: Mapping[str, float | int]) -> None:
    """One row a figure: fractions as percentages, counts as they are."""
    table = Table(title=title, show_header=False)
    for name, value in results.items():
        shown = f"{value:.2%}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


def write_json(results: Mapping[str, float | int], target: str) -> None:
    """Write to the file `target`, or to standard output where it is `-`."""
    text = json.dumps(results, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise InputError(f"cannot write --json {target}: {error.strerror}") from None
