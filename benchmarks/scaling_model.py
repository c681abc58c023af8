"""How runs of the recipes in configs/ would scale: a MODEL of 8 to 1,024 GPUs, nothing is measured.

    python benchmarks/scaling_model.py [--gpu h100] [--gpu-memory 80GB] [--quick]

Samples a second and MFU by the planner's time model (docs/planning.md says what it leaves out), in
the quickest layout of those that fit: strong scaling with one global batch, weak scaling with the
same pairs on each GPU. Tried are tensor sizes within a node, pipelines of up to 8 stages without
virtual ones, microbatches that are powers of two, and each recomputation; `parallel-clip plan`
tries more. Prints a table and writes JSON and a picture to benchmarks/results. `--quick` takes one
recipe and two sizes, and prints only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import describe, environment, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from parallel_clip.config import Config, load_config, parse_bytes
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.device_file import Device, read_device
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.search import (
    RECOMPUTES,
    LayoutSearch,
    PlannedLayout,
    divides,
    tensor_sizes,
    with_layout,
    with_micro,
)
from parallel_clip.plan.step_time import StepTime, predict_step

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [
    ("siglip_vit_b_16.yaml", []),
    ("vit_l_14_3_stages.yaml", []),
    ("siglip_vit_b_16.yaml", ["model.name=ViT-SO400M-14-SigLIP-384"]),
    ("vit_h_14_8gpu.yaml", []),
    ("vit_bigg_14_128gpu.yaml", []),
]
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
STRONG_BATCH = 65_536
WEAK_PAIRS = 64  # on each GPU: at 1,024 GPUs both batches are the same
NODE = 8
PIPELINES = (1, 2, 4, 8)
MICROBATCHES = tuple(2**n for n in range(3, 10))
MODEL_WORDS = "a model, not measured"


@dataclass(frozen=True)
class ScalingRow:
    """A predicted step in the quickest layout. scaling: strong or weak; layout: as people write
    it."""

    recipe: str
    model: str
    scaling: str
    gpus: int
    batch: int
    layout: str
    recompute: str
    step_seconds: float
    samples_per_second: float
    mfu: float
    bubble: float
    memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100", help="the name of a device, or its file")
    parser.add_argument("--gpu-memory", default="80GB")
    parser.add_argument("--quick", action="store_true", help="one recipe, two sizes, no files")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        device = read_device(arguments.gpu)
        limit = parse_bytes(arguments.gpu_memory, "--gpu-memory")
    except InputError as error:
        parser.error(str(error))
    recipes, sizes = (RECIPES[1:2], GPUS[:2]) if arguments.quick else (RECIPES, GPUS)

    rows: list[ScalingRow] = []
    for file, overrides in recipes:
        of_recipe = list(scale(file, overrides, sizes, device, limit))
        rows += of_recipe
        print_table(console, of_recipe, device.name)
    results = {
        "environment": environment(),
        "what": f"{MODEL_WORDS}: predicted by parallel_clip/plan/step_time.py",
        "device": device.name,
        "gpu_memory_bytes": limit,
        "nodes_of": NODE,
        "rows": [asdict(row) for row in rows],
    }
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if not arguments.quick:
        print(*write_results("scaling-model", results, draw(rows, results)), sep="\n")


def scale(
    file: str, overrides: Sequence[str], sizes: Sequence[int], device: Device, limit: int
) -> Iterator[ScalingRow]:
    """The rows of one recipe; none where no layout fits."""
    recipe = load_config(str(CONFIGS / file), list(overrides))
    for gpus in sizes:
        search = layout_search(recipe, gpus, device, limit)
        for scaling, batch in (("strong", STRONG_BATCH), ("weak", WEAK_PAIRS * gpus)):
            of_batch = recipe.batch.model_copy(update={"global_": batch})
            config = recipe.model_copy(update={"batch": of_batch})
            best = quickest(search, config)
            if best is None:
                continue
            yield ScalingRow(
                file,
                recipe.model.name,
                scaling,
                gpus,
                batch,
                _words(best),
                best.config.recompute,
                best.time.seconds,
                best.time.samples_per_second,
                best.time.mfu,
                best.time.bubble,
                best.memory.total,
            )


def layout_search(config: Config, gpus: int, device: Device, limit: int) -> LayoutSearch:
    architecture = load_architecture(config.model.name)

    def predict(plan: LayoutPlan, config: Config) -> StepTime:
        return predict_step(plan, architecture, config, device, NODE)

    return LayoutSearch(config, architecture, gpus, limit, NODE, predict)


def quickest(search: LayoutSearch, config: Config) -> PlannedLayout | None:
    found = fitting_layouts(search, config)
    return min(found, key=lambda layout: layout.time.seconds, default=None)


def fitting_layouts(search: LayoutSearch, config: Config) -> Iterator[PlannedLayout]:
    """Of the layouts that are tried here."""
    return filter(None, map(partial(_one, search), _candidates(search, config)))


def _one(search: LayoutSearch, config: Config) -> PlannedLayout | None:
    try:
        layout = search.one(config)
    except InputError:  # its sizes do not divide
        return None
    return layout if isinstance(layout, PlannedLayout) else None


def _candidates(search: LayoutSearch, config: Config) -> Iterator[Config]:
    for tensor in tensor_sizes(search.gpus, NODE):
        pad = not divides(tensor, search.costs)
        for pipeline in PIPELINES:
            if search.gpus % (tensor * pipeline):
                continue
            shape = with_layout(config, tensor=tensor, pad=pad, pipeline=pipeline, virtual=1)
            of_rank = config.batch.global_ * tensor * pipeline // search.gpus
            for micro in MICROBATCHES:
                if of_rank % micro:
                    continue
                for recompute in RECOMPUTES:
                    yield with_micro(shape, micro).model_copy(update={"recompute": recompute})


def _words(found: PlannedLayout) -> str:
    layout, batch = found.plan.layout, found.plan.batch
    kept = {0: "two-pass", batch.microbatches: "all graphs"}.get(
        found.plan.stash, f"{found.plan.stash} graphs"
    )
    sizes = f"{layout.tensor} x {layout.pipeline} x {layout.data}"
    return f"{sizes}, {batch.microbatches} of {batch.micro_batch}, {kept}"


# ------------------------------------------------------------------------------------ reporting


def print_table(console: Console, rows: Sequence[ScalingRow], device: str) -> None:
    if not rows:
        return
    table = Table(title=f"{rows[0].model} on {device}: {MODEL_WORDS}", title_justify="left")
    for column in ("scaling", "GPUs", "batch", "samples/s", "of each GPU", "MFU", "bubble", "GB"):
        table.add_column(column, justify="right")
    table.add_column("tensor x pipeline x data, microbatches")
    table.add_column("recompute")
    for row in sorted(rows, key=lambda row: row.scaling):
        table.add_row(
            row.scaling,
            f"{row.gpus:,}",
            f"{row.batch:,}",
            f"{row.samples_per_second:,.0f}",
            f"{row.samples_per_second / row.gpus:,.0f}",
            f"{row.mfu:.1%}",
            f"{row.bubble:.1%}",
            f"{row.memory_bytes / 1e9:.1f}",
            row.layout,
            row.recompute,
        )
    console.print(table)


def draw(rows: Sequence[ScalingRow], results: dict[str, Any]) -> Figure:
    """Above samples a second, dotted what as many times the GPUs would give; below MFU."""
    figure = Figure(figsize=(11, 8))
    panels = figure.subplots(2, 2, sharex=True)
    for number, scaling in enumerate(("strong", "weak")):
        of_scaling = [row for row in rows if row.scaling == scaling]
        above, below = panels[0][number], panels[1][number]
        _draw_lines(above, below, of_scaling)
        batch = (
            f"global batch {STRONG_BATCH:,}" if scaling == "strong" else f"{WEAK_PAIRS} pairs a GPU"
        )
        above.set_title(f"MODEL, not measured: {scaling} scaling, {batch}", fontsize=10)
        below.set_xlabel(f"GPUs ({results['device']}, nodes of {NODE})")
    panels[0][0].set_ylabel("predicted samples/s")
    panels[1][0].set_ylabel("predicted MFU")
    panels[0][0].legend(fontsize=8)
    words = f"Predicted by a time model, nothing on a GPU. {describe(results['environment'])}"
    figure.text(0.01, 0.005, words, fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _draw_lines(above: Axes, below: Axes, rows: Sequence[ScalingRow]) -> None:
    for number, model in enumerate(dict.fromkeys(row.model for row in rows)):
        of_model = [row for row in rows if row.model == model]
        gpus, color = [row.gpus for row in of_model], f"C{number}"
        speeds = [row.samples_per_second for row in of_model]
        above.plot(gpus, speeds, "o-", color=color, label=model)
        ideal = [speeds[0] * count / gpus[0] for count in gpus]
        above.plot(gpus, ideal, ":", color=color, linewidth=1)
        below.plot(gpus, [row.mfu for row in of_model], "o-", color=color)
    above.set_xscale("log", base=2)
    above.set_yscale("log", base=10)
    below.set_xticks(GPUS, [str(count) for count in GPUS])
    below.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
