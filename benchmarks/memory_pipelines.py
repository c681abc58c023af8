"""The part of memory_scaling.py that is about pipelines: what the fullest stage holds.

`m` microbatches, two-pass: the first of P stages holds the activations of P microbatches in its
1/P of the layers, as 1F1B does, so that a pipeline splits state and not activations. The unsplit
model beside it runs two-pass too and holds those of one microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from matplotlib.axes import Axes
from memory_counts import GIB, Counts
from rich.console import Console
from rich.table import Table

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.pipeline.orders import peak_graphs, step_orders
from parallel_clip.plan.memory import RankMemory
from parallel_clip.stages.stage import Stage

PIPELINE_SIZES = [1, 2, 3, 4, 6, 8]
PIPELINE_RECOMPUTES = ["none"]
MICROBATCHES = 16
LARGE_WORLD = 128

_BYTES_A_PARAMETER = 2 + 4 + 12  # bf16 weight; gradient; master and two moments
_EMBEDDING = {
    "patch_embedding", "class_embedding", "positional_embedding", "pre_norm", "token_embedding",
}  # fmt: skip


@dataclass(frozen=True)
class PipelineRow:
    """The fullest stage under one layout, and beside it the same model unsplit.

    `outside_layers`: bytes of the stage's state that belong to embeddings and heads, which a
    pipeline does not split.
    """

    model: str
    tensor: int
    pipeline: int
    recompute: str
    stages: Sequence[Stage]
    fullest: int
    held: RankMemory
    activations: int
    outside_layers: int
    unsplit: RankMemory

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def state_ratio(self) -> float:
        return self.held.state / self.unsplit.state

    @property
    def activations_ratio(self) -> float:
        return self.activations / self.unsplit.saved

    @property
    def above_even(self) -> float:
        """By how much the state is more than its even share of all ranks: 0.1 is a tenth more."""
        return self.state_ratio * self.ranks - 1

    def as_dict(self) -> dict[str, Any]:
        held = self.held
        return {
            "model": self.model,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "recompute": self.recompute,
            "vision_layers": [stage.vision.layers for stage in self.stages],
            "text_layers": [stage.text.layers for stage in self.stages],
            "fullest_stage": self.fullest,
            "parameters": held.parameters,
            "weights": held.weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "outside_layers": self.outside_layers,
            "activations": self.activations,
            "state_ratio": self.state_ratio,
            "state_above_even": self.above_even,
            "activations_ratio": self.activations_ratio,
        }


def measure_pipelines(
    counts: Counts,
    tensor_sizes: Sequence[int],
    pipeline_sizes: Sequence[int],
    recomputes: Sequence[str],
) -> Iterator[PipelineRow]:
    """Rows by recompute, tensor size, pipeline size; sequence parallelism where tensor > 1."""
    for recompute in recomputes:
        unsplit = counts.held(Layout(1), recompute)
        for tensor in tensor_sizes:
            for pipeline in pipeline_sizes:
                layout = Layout(tensor * pipeline, tensor, pipeline, sequence=tensor > 1)
                yield _row(counts, layout, recompute, unsplit)


def _row(counts: Counts, layout: Layout, recompute: str, unsplit: RankMemory) -> PipelineRow:
    stages = counts.stages(layout)
    orders = step_orders(layout.pipeline, MICROBATCHES)
    found = []
    for number, order in enumerate(orders):
        held = counts.held(layout, recompute, number)
        activations = peak_graphs(order, held.saved_by_chunk)
        found.append((held.state + activations, -number, held, activations))
    _, minus_number, held, activations = max(found, key=lambda item: item[:2])
    fullest = -minus_number
    return PipelineRow(
        counts.architecture.name,
        layout.tensor,
        layout.pipeline,
        recompute,
        stages,
        fullest,
        held,
        activations,
        outside_layers(stages[fullest], counts.architecture, layout.tensor),
        unsplit,
    )


def outside_layers(stage: Stage, architecture: Architecture, tensor: int) -> int:
    """Bytes of state, on a rank of a stage, of all that is in no layer."""
    parameters = 0
    for parameter in parameter_table(architecture):
        tower, _, rest = parameter.module.partition(".")
        part = rest.split(".")[0]
        if tower not in ("vision", "text") or part == "block":
            continue
        layers = getattr(stage, tower)
        if layers.has_embedding if part in _EMBEDDING else layers.has_head:
            split = 1 if parameter.placement.axis is None else tensor
            parameters += -(-prod(parameter.shape) // split)
    return _BYTES_A_PARAMETER * parameters


def measure_large_world(counts: Counts, row: PipelineRow) -> dict[str, dict[str, int]]:
    """The row's fullest stage among 128 ranks, the rest of which are data-parallel."""
    layout = Layout(LARGE_WORLD, row.tensor, row.pipeline, sequence=row.tensor > 1)
    found = {}
    for zero in (False, True):
        held = counts.held(layout, row.recompute, row.fullest, zero)
        found["zero" if zero else "no zero"] = {
            "data": layout.data,
            "weights": held.weights,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "state": held.state,
            "activations_of_a_microbatch": held.saved,
        }
    if found["no zero"]["state"] != row.held.state:
        raise RuntimeError(
            f"without ZeRO a rank of {LARGE_WORLD} holds {found['no zero']['state']} bytes of "
            f"state, and {row.held.state} with one data rank"
        )
    return found


# ------------------------------------------------------------------------------------ reporting


def print_pipelines(console: Console, name: str, rows: Sequence[PipelineRow], pairs: int) -> None:
    table = Table(
        title=f"{name}: GiB on the fullest stage, bf16, {MICROBATCHES} microbatches of {pairs} "
        "pairs, two-pass",
        title_justify="left",
    )
    table.add_column("recompute")
    for column in (
        "tensor", "pipeline", "ranks", "stage", "its layers", "state", "ratio", "above even",
        "outside layers", "activations", "ratio",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        stage = row.stages[row.fullest]
        table.add_row(
            row.recompute,
            str(row.tensor),
            str(row.pipeline),
            str(row.ranks),
            str(row.fullest),
            f"{stage.vision.layers} + {stage.text.layers}",
            f"{row.held.state / GIB:.3f}",
            f"{row.state_ratio:.4f}",
            f"{row.above_even:+.1%}",
            f"{row.outside_layers / GIB:.3f}",
            f"{row.activations / GIB:.3f}",
            f"{row.activations_ratio:.4f}",
            end_section=after is None
            or (after.recompute, after.tensor) != (row.recompute, row.tensor),
        )
    console.print(table)
    deepest = max(rows, key=lambda row: row.pipeline)
    dealt = {
        tower: ", ".join(str(getattr(stage, tower).layers) for stage in deepest.stages)
        for tower in ("vision", "text")
    }
    console.print(
        f"at pipeline {deepest.pipeline} the stages have {dealt['vision']} vision layers and "
        f"{dealt['text']} text layers\n"
    )


def print_large_world(console: Console, row: PipelineRow, found: dict[str, dict[str, int]]) -> None:
    for zero, held in found.items():
        console.print(
            f"{row.model}, {LARGE_WORLD} ranks: tensor {row.tensor} × pipeline {row.pipeline} × "
            f"data {held['data']}, {zero}: stage {row.fullest} has {held['state'] / GIB:.3f} GiB "
            f"of state and {row.activations / GIB:.3f} GiB of activations"
        )
    console.print()


def draw_fullest(axes: Axes, rows: Sequence[PipelineRow], pairs: int) -> None:
    """What the fullest stage holds, by pipeline size."""
    labels = [str(row.pipeline) for row in rows]
    bottom = [0.0] * len(rows)
    for what in ("weights", "gradients", "optimizer", "activations"):
        of = [row if what == "activations" else row.held for row in rows]
        heights = [getattr(x, what) / GIB for x in of]
        label = f"activations, {MICROBATCHES} × {pairs} pairs" if what == "activations" else what
        axes.bar(labels, heights, bottom=bottom, label=label, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for label, total in zip(labels, bottom, strict=True):
        axes.annotate(f"{total:.1f}", (label, total), ha="center", va="bottom")
    axes.set_xlabel("pipeline size, tensor size 1, no recompute")
    axes.set_ylabel("GiB on the fullest stage")
    axes.set_title(f"{rows[0].model}, two-pass", fontsize=10)
    axes.legend(fontsize=8)


def draw_pipeline_shares(axes: Axes, rows: Sequence[PipelineRow]) -> None:
    """Each model's share of the unsplit model's state and activations, by pipeline size."""
    for number, name in enumerate(dict.fromkeys(row.model for row in rows)):
        of_model = [row for row in rows if row.model == name]
        sizes, color = [row.pipeline for row in of_model], f"C{number}"
        axes.plot(sizes, [row.state_ratio for row in of_model], "o-", color=color, label=name)
        axes.plot(sizes, [row.activations_ratio for row in of_model], "s--", color=color,
                  markerfacecolor="none")  # fmt: skip
    sizes = sorted({row.pipeline for row in rows})
    axes.plot(sizes, [1 / size for size in sizes], ":", color="grey", label="1 / pipeline size")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_yticks([1 / 2**n for n in range(4)], [f"{1 / 2**n:g}" for n in range(4)])
    axes.set_xlabel("pipeline size")
    axes.set_title(
        "share of the unsplit model on the fullest stage\n(circles: state; squares: activations)",
        fontsize=10,
    )
    axes.legend(fontsize=8)
