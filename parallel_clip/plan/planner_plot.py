"""A picture of all layouts that fit: time against memory, the front marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from parallel_clip.errors import InputError
from parallel_clip.plan.planner import Answer
from parallel_clip.plan.search import PlannedLayout


def front(layouts: Sequence[PlannedLayout]) -> list[PlannedLayout]:
    """Those beside which no other is both quicker and smaller, by memory. layouts: the quickest
    first."""
    found: list[PlannedLayout] = []
    for each in layouts:
        if not found or each.memory.total < found[-1].memory.total:
            found.append(each)
    return found[::-1]


def check_plot_target(path: str | None) -> None:
    """See that a picture can be drawn and written to `path`.

    Raises:
        InputError: it cannot.
    """
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    folder = Path(path).absolute().parent
    if Path(path).suffix not in (".png", ".svg", ".pdf") or not os.access(folder, os.W_OK):
        raise InputError(
            f"cannot write --plot {path}: name a .png, .svg or .pdf file in a folder that can be "
            "written to"
        )


def draw_layouts(answer: Answer, path: str) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    layouts = answer.result.layouts
    for number, tensor in enumerate(sorted({each.plan.layout.tensor for each in layouts})):
        of_size = [each for each in layouts if each.plan.layout.tensor == tensor]
        axes.scatter(
            [each.memory.total / 1e9 for each in of_size],
            [each.time.seconds for each in of_size],
            s=10,
            color=f"C{number}",
            label=f"tensor {tensor}",
        )
    best = front(layouts)
    axes.plot(
        [each.memory.total / 1e9 for each in best],
        [each.time.seconds for each in best],
        color="black",
        linewidth=1,
        marker="o",
        markerfacecolor="none",
        label="no other is quicker and smaller",
    )
    for each in best[-1:] + best[:1]:
        layout = each.plan.layout
        axes.annotate(
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
            f"micro {each.plan.batch.micro_batch}",
            (each.memory.total / 1e9, each.time.seconds),
            fontsize=7,
            xytext=(4, 6),
            textcoords="offset points",
        )
    axes.axvline(answer.limit / 1e9, color="grey", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("memory of the fullest GPU, GB")
    axes.set_ylabel("predicted step, seconds")
    axes.set_title(
        f"{answer.architecture.name}, batch {answer.question.config.batch.global_:,}, "
        f"{answer.question.gpus:,} x {answer.device.name}",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
