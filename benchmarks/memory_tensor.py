"""The part of memory_scaling.py that is about tensor sizes: one microbatch, one data rank."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from memory_counts import GIB, Counts
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parallel_clip.errors import InputError
from parallel_clip.layout import Layout, check_model
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.memory import RankMemory

TENSOR_SIZES = [1, 2, 4, 8]
RECOMPUTES = ["none", "selective", "full"]

# Largest shares of tensor size 1 at which the split counts as whole: by tensor size, for all that
# stays from step to step, and for activations with sequence parallelism and no recompute.
BAR_MODEL = "ViT-H-14"
STATE_BARS = {2: 0.51, 4: 0.26, 8: 0.13}
ACTIVATION_BARS = {2: 0.51, 4: 0.26, 8: 0.135}

# Padding of sequences that the tensor size does not divide looks like a whole part of this share.
PADDING = 0.02


@dataclass(frozen=True)
class Row:
    """What a rank holds under one layout, and beside it what the same model holds unsplit."""

    model: str
    tensor: int
    sequence: bool
    recompute: str
    held: RankMemory
    unsplit: RankMemory

    @property
    def state_ratio(self) -> float:
        return self.held.state / self.unsplit.state

    @property
    def saved_ratio(self) -> float:
        return self.held.saved / self.unsplit.saved

    @property
    def whole_activations(self) -> dict[str, int]:
        """By part of the model, the saved bytes that this tensor size does not split: w, where a
        part holds w + split at tensor size 1 and w + split / t at t."""
        if self.tensor == 1:
            return {}
        found = {}
        for part, held in self.held.activations[0].items():
            before = self.unsplit.activations[0].get(part, 0)
            whole = min(held, (self.tensor * held - before) // (self.tensor - 1))
            if whole > PADDING * before:
                found[part] = whole
        return found

    def as_dict(self) -> dict[str, Any]:
        held = self.held
        return {
            "model": self.model,
            "tensor": self.tensor,
            "sequence": self.sequence,
            "recompute": self.recompute,
            **dataclasses.asdict(held),
            "activations": held.saved,
            "state_ratio": self.state_ratio,
            "activations_ratio": self.saved_ratio,
            "whole_activations": self.whole_activations,
        }


def tensor_sizes(architecture: Architecture, sizes: list[int]) -> tuple[list[int], list[str]]:
    """The sizes that divide the model, and why the others do not."""
    fitting, refusals = [], []
    for size in sizes:
        try:
            check_model(size, architecture.costs)
            fitting.append(size)
        except InputError as error:
            refusals.append(str(error))
    return fitting, refusals


def measure(counts: Counts, sizes: list[int], recomputes: list[str]) -> Iterator[Row]:
    cases = [
        (recompute, size, sequence)
        for recompute in recomputes
        for size in sizes
        for sequence in ((False, True) if size > 1 else (False,))
    ]
    unsplit: dict[str, RankMemory] = {}
    name = counts.architecture.name
    for recompute, size, sequence in track(
        cases, description=name, disable=not sys.stdout.isatty()
    ):
        held = counts.held(Layout(size, tensor=size, sequence=sequence), recompute)
        unsplit.setdefault(recompute, held)  # the first case is tensor size 1
        yield Row(name, size, sequence, recompute, held, unsplit[recompute])


def missed_bars(rows: list[Row]) -> list[str]:
    misses = []
    for row in rows:
        if row.model != BAR_MODEL or row.recompute != "none" or row.tensor == 1:
            continue
        checks = [("weights + gradients + optimizer", row.state_ratio, STATE_BARS[row.tensor])]
        if row.sequence:
            checks.append(("activations", row.saved_ratio, ACTIVATION_BARS[row.tensor]))
        misses += [
            f"{row.model} at tensor {row.tensor}{', sequence' * row.sequence}: {what} are "
            f"{ratio:.4f} of tensor 1, above the bar of {bar}"
            for what, ratio, bar in checks
            if ratio > bar
        ]
    return misses


# ------------------------------------------------------------------------------------ reporting


def print_table(
    console: Console, name: str, rows: list[Row], pairs: int, refusals: list[str]
) -> None:
    table = Table(title=f"{name}: GiB on a rank, bf16, {pairs} pairs", title_justify="left")
    table.add_column("recompute")
    for column in (
        "tensor", "sequence", "weights", "gradients", "optimizer", "ratio", "of it whole",
        "activations", "ratio", "of it whole",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        held = row.held
        table.add_row(
            row.recompute,
            str(row.tensor),
            "yes" if row.sequence else "no",
            *(f"{count / GIB:.3f}" for count in (held.weights, held.gradients, held.optimizer)),
            f"{row.state_ratio:.4f}",
            f"{held.replicated / GIB:.3f}",
            f"{held.saved / GIB:.3f}",
            f"{row.saved_ratio:.4f}",
            f"{sum(row.whole_activations.values()) / GIB:.3f}",
            end_section=row is rows[-1] or rows[rows.index(row) + 1].recompute != row.recompute,
        )
    console.print(table)
    last = next((row for row in reversed(rows) if row.recompute == "none"), rows[-1])
    parts = sorted(last.whole_activations.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{part or 'features'} {count / 2**20:.1f}" for part, count in parts)
    console.print(f"whole on each rank at tensor {last.tensor} with sequence (MiB): {listed}")
    for refusal in refusals:
        console.print(refusal)
    console.print()


def draw_shares(axes: Axes, rows: list[Row]) -> None:
    """Each model's share of what it holds at tensor size 1."""
    for number, name in enumerate(dict.fromkeys(row.model for row in rows)):
        of_model = [row for row in rows if row.model == name]
        sizes, color = [row.tensor for row in of_model], f"C{number}"
        state, saved = (
            [getattr(row, ratio) for row in of_model] for ratio in ("state_ratio", "saved_ratio")
        )
        axes.plot(sizes, state, "o-", color=color, label=name)
        axes.plot(sizes, saved, "s--", color=color, markerfacecolor="none")
    ideal = sorted({row.tensor for row in rows})
    axes.plot(ideal, [1 / size for size in ideal], ":", color="grey", label="1 / tensor size")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ideal, [str(size) for size in ideal])
    axes.set_yticks([1 / size for size in ideal], [f"{1 / size:g}" for size in ideal])
    axes.set_xlabel("tensor size")
    axes.set_title("share of tensor size 1\n(circles: state; squares: activations)", fontsize=10)
    axes.legend(fontsize=8)


def draw_bars(axes: Axes, rows: list[Row], pairs: int) -> None:
    labels = [str(row.tensor) for row in rows]
    bottom = [0.0] * len(rows)
    for what in ("weights", "gradients", "optimizer", "saved"):
        heights = [getattr(row.held, what) / GIB for row in rows]
        label = f"activations, {pairs} pairs" if what == "saved" else what
        axes.bar(labels, heights, bottom=bottom, label=label, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for label, total in zip(labels, bottom, strict=True):
        axes.annotate(f"{total:.1f}", (label, total), ha="center", va="bottom")
    axes.set_xlabel("tensor size, with sequence parallelism, no recompute")
    axes.set_ylabel("GiB on a rank")
    axes.set_title(f"{rows[0].model}, both towers, bf16, no ZeRO", fontsize=10)
    axes.legend(fontsize=8)
