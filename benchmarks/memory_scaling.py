"""Memory of a GPU by layout: weights, gradients, optimizer, activations; beside it OpenCLIP's.

    python benchmarks/memory_scaling.py [--models ViT-H-14 ...] [--pairs 32] [--quick]

Ours is what the planner counts (memory_counts.py), in bf16: tensor sizes for one microbatch, one
data rank and no ZeRO; pipelines, and products of both, by their fullest stage in a two-pass step of
16 microbatches. Then 1 to 1,024 GPUs, with what OpenCLIP's own model holds under DDP and FSDP2
(memory_openclip.py). Nothing takes memory to speak of. First of all it is held against real
processes with small models, and each model against a dry run (memory_checks.py).

Prints tables and writes JSON and pictures to benchmarks/results. Exit code 1 where ViT-H-14 misses
its bars. `--quick` takes one model and few layouts, and prints only.
"""

import argparse
import sys
from typing import Any

from common import describe, environment, write_results
from matplotlib.figure import Figure
from memory_checks import (
    check_against_dry_run,
    check_against_processes,
    check_openclip_against_processes,
)
from memory_counts import Counts
from memory_headline import MODEL, headline_rows, print_headline
from memory_pipelines import (
    LARGE_WORLD,
    MICROBATCHES,
    PIPELINE_RECOMPUTES,
    PIPELINE_SIZES,
    PipelineRow,
    draw_fullest,
    draw_pipeline_shares,
    measure_large_world,
    measure_pipelines,
    print_large_world,
    print_pipelines,
)
from memory_tensor import (
    BAR_MODEL,
    RECOMPUTES,
    TENSOR_SIZES,
    Row,
    draw_bars,
    draw_shares,
    measure,
    missed_bars,
    print_table,
    tensor_sizes,
)
from memory_worlds import BATCH, WORLDS, WorldRow, draw_worlds, measure_worlds, print_worlds
from rich.console import Console

from parallel_clip import __version__
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture

MODELS = [
    "ViT-B-16",
    "ViT-L-14",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-SO400M-14-SigLIP-384",
    "PE-Core-bigG-14-448",
]

# Shown with data parallelism as well: model, tensor size, pipeline size, recompute.
LARGE = ("ViT-bigG-14", 4, 8, "none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--pairs", type=int, default=32, help="of one microbatch")
    parser.add_argument("--quick", action="store_true", help="one model, few layouts, no files")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)

    names = ["ViT-B-32"] if arguments.quick else arguments.models
    sizes = TENSOR_SIZES[:2] if arguments.quick else TENSOR_SIZES
    recomputes = RECOMPUTES[:1] if arguments.quick else RECOMPUTES
    pipeline_sizes = PIPELINE_SIZES[:2] if arguments.quick else PIPELINE_SIZES
    worlds_sizes = [1, 8] if arguments.quick else WORLDS

    try:
        architectures = [load_architecture(name) for name in names]
    except InputError as error:
        parser.error(str(error))
    check_against_processes()
    check_openclip_against_processes()
    console.print("real processes with small models hold what is counted, to the byte")
    rows: list[Row] = []
    pipelines: list[PipelineRow] = []
    worlds: list[WorldRow] = []
    stops: dict[str, str] = {}
    large_world = None
    for name, architecture in zip(names, architectures, strict=True):
        counts = Counts(architecture, arguments.pairs)
        fitting, refusals = tensor_sizes(architecture, sizes)
        check_against_dry_run(counts, fitting[min(1, len(fitting) - 1)])
        of_model = list(measure(counts, fitting, recomputes))
        rows += of_model
        stops |= {name: refusals[0]} if refusals else {}
        print_table(console, name, of_model, arguments.pairs, refusals)
        staged = list(measure_pipelines(counts, fitting, pipeline_sizes, PIPELINE_RECOMPUTES))
        pipelines += staged
        print_pipelines(console, name, staged, arguments.pairs)
        for row in staged:
            if (row.model, row.tensor, row.pipeline, row.recompute) == LARGE:
                large_world = measure_large_world(counts, row)
                print_large_world(console, row, large_world)
        in_worlds = list(measure_worlds(counts, worlds_sizes))
        worlds += in_worlds
        print_worlds(console, name, in_worlds)
    headline = headline_rows(load_architecture(MODEL))
    print_headline(console, headline)

    common = {"environment": environment(), "pairs": arguments.pairs, "precision": "bf16"}
    results = {
        **common,
        "rows": [row.as_dict() for row in rows],
        "stops": stops,
        "microbatches": MICROBATCHES,
        "pipelines": [row.as_dict() for row in pipelines],
        f"at_{LARGE_WORLD}_ranks": large_world,
        "headline": [row.as_dict() for row in headline],
    }
    of_worlds = {**common, "global_batch": BATCH, "rows": [row.as_dict() for row in worlds]}
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if not arguments.quick:
        written = write_results(
            f"memory-scaling-{__version__}", results, draw(rows, pipelines, results)
        )
        figure = draw_worlds(worlds, arguments.pairs, describe(results["environment"]))
        written += write_results(f"memory-worlds-{__version__}", of_worlds, figure)
        print(*written, sep="\n")
    misses = missed_bars(rows)
    for miss in misses:
        console.print(f"[red]{miss}")
    return 1 if misses else 0


def draw(rows: list[Row], pipelines: list[PipelineRow], results: dict[str, Any]) -> Figure:
    """Above by tensor size, below by pipeline size. Left: what one model's rank holds. Right: each
    model's share of the unsplit model."""
    figure = Figure(figsize=(12, 9.6))
    (bars, lines), (stage_bars, stage_lines) = figure.subplots(2, 2)
    rows = [row for row in rows if row.recompute == "none" and (row.sequence or row.tensor == 1)]
    names = list(dict.fromkeys(row.model for row in rows))
    shown = BAR_MODEL if BAR_MODEL in names else names[0]
    draw_bars(bars, [row for row in rows if row.model == shown], results["pairs"])
    draw_shares(lines, rows)
    pipelines = [row for row in pipelines if row.recompute == "none" and row.tensor == 1]
    draw_fullest(stage_bars, [row for row in pipelines if row.model == shown], results["pairs"])
    draw_pipeline_shares(stage_lines, pipelines)
    figure.text(0.01, 0.01, describe(results["environment"]), fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


if __name__ == "__main__":
    sys.exit(main())
