"""Print the report of `data check`, or turn it into JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel_clip.data.storage.tar import printable
from parallel_clip.data.tools.check import BadItem, CheckReport, Remark

_BAR = 40  # characters of the longest


def print_report(report: CheckReport, console: Console | None = None) -> None:
    """Print a line for each bad item and remark, then histograms of picture sizes and caption
    lengths."""
    for item in (*report.broken, *report.remarks):
        print(printable(str(item)))
    console = console or Console()
    for title, counts in (
        ("shorter side of pictures, pixels", report.sides),
        (f"length of {report.captions:,} captions, bytes", report.caption_bytes),
    ):
        if counts:
            console.print(_histogram(title, counts))
    broken = len(report.broken)
    remarks = f", {len(report.remarks):,} remarks" if report.remarks else ""
    print(f"{report.shards:,} shards, {report.samples:,} samples, {broken:,} broken{remarks}")


def report_tree(report: CheckReport) -> dict[str, Any]:
    """The report ready for JSON; histograms by the lower bound of each class."""
    return {
        "shards": report.shards,
        "samples": report.samples,
        "captions": report.captions,
        "broken": [_item_tree(item) for item in report.broken],
        "remarks": [_item_tree(item) for item in report.remarks],
        "shorter_side_pixels": {2**power: n for power, n in sorted(report.sides.items())},
        "caption_bytes": {2**power: n for power, n in sorted(report.caption_bytes.items())},
    }


def _item_tree(item: BadItem | Remark) -> dict[str, str | None]:
    """Its fields, in which bytes of a name that are no UTF-8 are escaped: JSON is UTF-8."""
    return {name: text and printable(text) for name, text in vars(item).items()}


def _histogram(title: str, counts: Counter[int]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(justify="right")
    most = max(counts.values())
    for power in range(min(counts), max(counts) + 1):
        count = counts[power]
        bar = "█" * -(-_BAR * count // most)
        table.add_row(f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{count:,}", bar)
    return table
