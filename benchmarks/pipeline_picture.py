"""The picture of benchmarks/pipeline.py: measured timelines, compute, and towers in turns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from common import describe
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from pipeline_cases import DRAWN, INTERLEAVED, STASH, TWO_PASS, Row

from parallel_clip.pipeline.orders import OpKind

COLORS = {
    OpKind.FORWARD_WITHOUT_GRAPH: "#b5d4ee",
    OpKind.FORWARD_KEEPING_GRAPH: "#3f9b6d",
    OpKind.FORWARD_AGAIN: "#3572b0",
    OpKind.BACKWARD: "#eda247",
}


def draw(rows: Sequence[Row], results: dict[str, Any]) -> Figure:
    """Left: timelines. Right: compute as more graphs are kept; one pipeline against two."""
    shown = [
        ("two passes", _find(rows, TWO_PASS, 0)),
        ("half of the microbatches keep their graphs", _find(rows, STASH, DRAWN[1] // 2)),
        ("all keep their graphs", _find(rows, STASH, DRAWN[1])),
        (
            "two passes, interleaved: 2 stages a rank, the second hatched",
            _find(rows, INTERLEAVED, 0),
        ),
    ]
    figure = Figure(figsize=(15, 9))
    grid = figure.add_gridspec(4, 2, width_ratios=[2.6, 1], hspace=0.55, wspace=0.16)
    longest = max(max(row.step.total, row.ideal) for _, row in shown)
    for place, (title, row) in enumerate(shown):
        axes = figure.add_subplot(grid[place, 0])
        _draw_timeline(axes, title, row)
        axes.set_xlim(0, 1.01 * longest)
    axes.set_xlabel("seconds")
    right = grid[:, 1].subgridspec(2, 1, hspace=0.35)
    _draw_compute(figure.add_subplot(right[0]), rows)
    _draw_towers(figure.add_subplot(right[1]), results["towers"])
    handles = [Patch(color=color, label=kind.value) for kind, color in COLORS.items()]
    handles.append(Patch(facecolor="white", edgecolor="grey", label="waiting"))
    handles.append(Line2D([], [], color="black", linestyle="--", label="ideal end"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.12, 0.95), ncols=6, frameon=False
    )
    foot = f"stages that sleep; {describe(results['environment'])}"
    figure.text(0.12, 0.02, foot, fontsize=7, color="grey")
    return figure


def _find(rows: Sequence[Row], table: str, stash: int) -> Row:
    ranks, microbatches = DRAWN
    return next(
        row
        for row in rows
        if row.plan.table == table
        and (row.plan.case.ranks, row.plan.case.microbatches) == (ranks, microbatches)
        and (row.plan.case.stash, row.plan.case.overlap) == (stash, False)
    )


def _draw_timeline(axes: Any, title: str, row: Row) -> None:
    for kind, color in COLORS.items():
        for rank, chunk in itertools.product(range(row.plan.case.ranks), range(2)):
            boxes = [
                (span.start, span.end - span.start)
                for span in row.step.spans
                if (span.rank, span.op.kind, span.op.chunk) == (rank, kind, chunk)
            ]
            axes.broken_barh(
                boxes,
                (rank - 0.42, 0.84),
                facecolor=color,
                edgecolor="white",
                linewidth=0.6,
                hatch="////" * chunk,
            )
    axes.axvline(row.ideal, color="black", linestyle="--", linewidth=1.2)
    axes.set_yticks(range(row.plan.case.ranks))
    axes.set_ylim(row.plan.case.ranks - 0.4, -0.6)
    axes.set_ylabel("rank")
    axes.set_title(
        f"{title}: {row.step.total:.2f} s, {row.overhead:.1%} over the ideal {row.ideal:.2f} s",
        fontsize=10,
        loc="left",
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_compute(axes: Any, rows: Sequence[Row]) -> None:
    ranks, microbatches = DRAWN
    of_size = [
        row
        for row in rows
        if row.plan.table in (TWO_PASS, STASH)
        and (row.plan.case.ranks, row.plan.case.microbatches) == (ranks, microbatches)
    ]
    shares = [row.plan.case.stash / microbatches for row in of_size]
    axes.plot([0, 1], [4 / 3, 1], ":", color="grey", label="(4 - share) / 3")
    axes.plot(shares, [row.compute for row in of_size], "o", color="#555555", label="measured")
    axes.set_xlabel("share of the microbatches that keep their graphs")
    axes.set_ylabel("compute / (forward + backward)")
    axes.set_title(f"what is computed: {ranks} ranks, {microbatches} microbatches", fontsize=10)
    axes.legend()


def _draw_towers(axes: Any, comparisons: Sequence[dict[str, Any]]) -> None:
    places = range(len(comparisons))
    for shift, what, label in (
        (-0.2, "measured", "measured"),
        (0.2, "by_arithmetic", "arithmetic"),
    ):
        heights = [found[what] for found in comparisons]
        color = "#555555" if what == "measured" else "#bbbbbb"
        axes.bar([x + shift for x in places], heights, 0.36, label=label, color=color)
        for x, height in zip(places, heights, strict=True):
            axes.annotate(
                f"{height:.3f}", (x + shift, height), ha="center", va="bottom", fontsize=8
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(places, [f"{found['model']}\n{found['ranks']} ranks" for found in comparisons])
    axes.set_ylim(0.9, 1.05 * max(found["measured"] for found in comparisons))
    axes.set_title("towers in turns: time / time of one pipeline for both", fontsize=10)
    axes.legend(loc="upper left")
