"""Print the figures of an evaluation as a table, and write them as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parallel_clip.errors import InputError


def print_table(title: str, results: Mapping[str, float | int]) -> None:
    """Print one row a figure: fractions as percentages, counts as they are."""
    table = Table(title=title, show_header=False)
    for name, value in results.items():
        shown = f"{value:.2%}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


def check_json_target(target: str | None) -> None:
    """Check that `write_json` can write to `target`, before there are figures to lose. InputError:
    the folder of the file is not there or not writable."""
    if target is None or target == "-":
        return
    folder = Path(target).absolute().parent
    if Path(target).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"cannot write --json {target}: {folder} is not a folder that can be written to, or "
            "the name is that of a folder; name a file in one that can"
        )


def write_json(results: object, target: str) -> None:
    """Write to the file `target`, or to standard output where it is `-`; InputError if neither."""
    text = json.dumps(results, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise InputError(f"cannot write --json {target}: {error.strerror}") from None
