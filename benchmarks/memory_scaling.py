"""Memory of one rank by tensor and pipeline size: weights, gradients, optimizer, activations.

    python benchmarks/memory_scaling.py [--models ViT-H-14 ...] [--pairs 32] [--quick]

Runs the trainer's own code as a rank of each layout with fake tensors and a fake process group, so
it needs no memory to speak of, and counts what is allocated: bf16, both towers, one data-parallel
rank, no ZeRO; the loss is not in it. Tensor sizes are shown for one microbatch; pipelines, and
products of both, by their fullest stage in a two-pass step of 16. The count itself is checked
against real processes with a small model. Prints tables and writes JSON and a picture to
benchmarks/results. Exit code 1 where ViT-H-14 misses its bars. `--quick` takes one model and few
layouts, and prints only.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from common import describe, environment, write_results
from matplotlib.figure import Figure
from memory_counts import Counts, config_for
from memory_pipelines import (
    LARGE_WORLD,
    MICROBATCHES,
    PIPELINE_RECOMPUTES,
    PIPELINE_SIZES,
    PipelineRow,
    draw_fullest,
    draw_shares,
    measure_large_world,
    measure_pipelines,
    print_large_world,
    print_pipelines,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parallel_clip import __version__
from parallel_clip.config import Config
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout, check_model
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.memory import RankMemory, dry_run, measure_rank_memory

MODELS = [
    "ViT-B-16",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-SO400M-14-SigLIP-384",
    "PE-Core-bigG-14-448",
]
TENSOR_SIZES = [1, 2, 4, 8]
RECOMPUTES = ["none", "selective", "full"]
GIB = 2**30

# Shown with data parallelism as well: model, tensor size, pipeline size, recompute.
LARGE = ("ViT-bigG-14", 4, 8, "none")

# Largest shares of tensor size 1 at which the split counts as whole: by tensor size, for all that
# stays from step to step, and for activations with sequence parallelism and no recompute.
BAR_MODEL = "ViT-H-14"
STATE_BARS = {2: 0.51, 4: 0.26, 8: 0.13}
ACTIVATION_BARS = {2: 0.51, 4: 0.26, 8: 0.135}

# Padding of sequences that the tensor size does not divide looks like a whole part of this share.
PADDING = 0.02

_SMALL_TOWER = {"width": 64, "layers": 2}
SMALL = architecture_from_json(
    {
        "embed_dim": 24,
        "vision_cfg": {**_SMALL_TOWER, "image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {**_SMALL_TOWER, "context_length": 13, "vocab_size": 101, "heads": 4},
    },
    "small",
)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--pairs", type=int, default=32, help="of one microbatch")
    parser.add_argument("--quick", action="store_true", help="one model, few layouts, no files")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    names = ["ViT-B-32"] if arguments.quick else arguments.models
    sizes = TENSOR_SIZES[:2] if arguments.quick else TENSOR_SIZES
    recomputes = RECOMPUTES[:1] if arguments.quick else RECOMPUTES

    pipeline_sizes = PIPELINE_SIZES[:2] if arguments.quick else PIPELINE_SIZES

    check_against_processes()
    console.print("real processes with a small model hold what the dry run counts, to the byte")
    rows: list[Row] = []
    pipelines: list[PipelineRow] = []
    stops: dict[str, str] = {}
    large_world = None
    for name in names:
        architecture = load_architecture(name)
        counts = Counts(architecture, arguments.pairs)
        fitting, refusals = tensor_sizes(architecture, sizes)
        of_model = list(measure(counts, fitting, recomputes))
        rows += of_model
        stops |= {name: refusals[0]} if refusals else {}
        print_table(console, name, of_model, arguments.pairs, refusals)
        staged = list(measure_pipelines(counts, fitting, pipeline_sizes, PIPELINE_RECOMPUTES))
        pipelines += staged
        print_pipelines(console, name, staged, arguments.pairs)
        for row in staged:
            if (row.model, row.tensor, row.pipeline, row.recompute) == LARGE:
                large_world = measure_large_world(architecture, row, arguments.pairs)
                print_large_world(console, row, large_world)

    results = {
        "environment": environment(),
        "pairs": arguments.pairs,
        "precision": "bf16",
        "rows": [row.as_dict() for row in rows],
        "stops": stops,
        "microbatches": MICROBATCHES,
        "pipelines": [row.as_dict() for row in pipelines],
        f"at_{LARGE_WORLD}_ranks": large_world,
    }
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if not arguments.quick:
        figure = draw(rows, pipelines, results)
        for path in write_results(f"memory-scaling-{__version__}", results, figure):
            print(path)
    misses = missed_bars(rows)
    for miss in misses:
        console.print(f"[red]{miss}")
    return 1 if misses else 0


# ------------------------------------------------------------------------------------- counting


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


def check_against_processes() -> None:
    """Count the small model in real processes; RuntimeError where the dry run differs."""
    for layout in (Layout(2, tensor=2, sequence=True), Layout(2, pipeline=2)):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_count_for_real, (layout, folder), nprocs=layout.world)
            for rank in range(layout.world):
                real = torch.load(f"{folder}/{rank}.pt", weights_only=False)
                dry = dry_run(*_small_case(layout), rank)
                if real != dry:
                    raise RuntimeError(
                        f"rank {rank} of {layout} really holds {real}, the dry run counts {dry}"
                    )


def _small_case(layout: Layout) -> tuple[Config, Architecture, LayoutPlan]:
    config = config_for(layout, "none", pairs=5)
    return config, SMALL, make_layout_plan(SMALL.costs, layout.world, config)


def _count_for_real(rank: int, layout: Layout, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=layout.world
    )
    join_world(Launch(rank, rank, layout.world))
    found = measure_rank_memory(*_small_case(layout), make_groups(layout))
    torch.save(found, f"{folder}/{rank}.pt")
    close_groups()


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


def draw(rows: list[Row], pipelines: list[PipelineRow], results: dict[str, Any]) -> Figure:
    """Above by tensor size, below by pipeline size. Left: what one model's rank holds. Right: each
    model's share of the unsplit model."""
    figure = Figure(figsize=(12, 9.6))
    (bars, lines), (stage_bars, stage_lines) = figure.subplots(2, 2)
    rows = [row for row in rows if row.recompute == "none" and (row.sequence or row.tensor == 1)]
    names = list(dict.fromkeys(row.model for row in rows))
    shown = BAR_MODEL if BAR_MODEL in names else names[0]
    _draw_bars(bars, [row for row in rows if row.model == shown], results["pairs"])
    for number, name in enumerate(names):
        of_model = [row for row in rows if row.model == name]
        sizes, color = [row.tensor for row in of_model], f"C{number}"
        state, saved = (
            [getattr(row, ratio) for row in of_model] for ratio in ("state_ratio", "saved_ratio")
        )
        lines.plot(sizes, state, "o-", color=color, label=name)
        lines.plot(sizes, saved, "s--", color=color, markerfacecolor="none")
    ideal = sorted({row.tensor for row in rows})
    lines.plot(ideal, [1 / size for size in ideal], ":", color="grey", label="1 / tensor size")
    lines.set_xscale("log", base=2)
    lines.set_yscale("log", base=2)
    lines.set_xticks(ideal, [str(size) for size in ideal])
    lines.set_yticks([1 / size for size in ideal], [f"{1 / size:g}" for size in ideal])
    lines.set_xlabel("tensor size")
    lines.set_title("share of tensor size 1\n(circles: state; squares: activations)", fontsize=10)
    lines.legend(fontsize=8)
    pipelines = [row for row in pipelines if row.recompute == "none" and row.tensor == 1]
    draw_fullest(stage_bars, [row for row in pipelines if row.model == shown], results["pairs"])
    draw_shares(stage_lines, pipelines)
    figure.text(0.01, 0.01, describe(results["environment"]), fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _draw_bars(axes: Any, rows: list[Row], pairs: int) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
