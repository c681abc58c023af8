"""Predicted against measured time of a step, on this machine and for published runs.

    python benchmarks/planned_time.py [--steps 3] [--cpu-time] [--quick]

The machine is calibrated as `parallel-clip plan --calibrate` does it: single operations, and one
step of ViT-S-32-alt with data parallelism alone. Then real steps of other models and layouts are
timed in one and in two processes and compared with `plan/step_time.py`. Published runs are compared
with the figures of the GPUs that come with the package. Prints tables and writes JSON and a picture
to benchmarks/results. `--quick` measures one small case and prints only.

A machine that is busy with other things measures the other things: the load average is in the file.
`--cpu-time` takes the processor's time of the rank that has most to do in place of the clock's:
what else runs changes it little. Waiting for other ranks is then not in it, predicted or measured.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import describe, environment, write_results
from matplotlib.figure import Figure
from published_runs import RUNS, PublishedRun
from rich.console import Console
from rich.table import Table

from parallel_clip.config import Config, config_from_dict
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.calibrate import measure_device
from parallel_clip.plan.device_file import device_from_dict, read_device
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.step_time import StepTime, predict_step
from parallel_clip.plan.timed_step import Clock, timed_steps


@dataclass(frozen=True)
class Case:
    """A step to measure; parallel: the section of the config."""

    model: str
    ranks: int
    micro: int
    microbatches: int
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    recompute: str = "none"

    @property
    def name(self) -> str:
        parts = [f"{key} {value}" for key, value in self.parallel.items()]
        parts += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return ", ".join(parts) or ("data 2" if self.ranks == 2 else "one rank")

    def config(self) -> Config:
        copy = self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1)
        pairs = self.micro * self.microbatches * self.ranks // copy
        return _config(self.model, pairs, self.micro, self.precision, self.recompute, self.parallel)


SMALL, LARGER = "ViT-S-32-alt", "ViT-B-32"
CASES = [
    Case(SMALL, 1, 8, 2, {"schedule": "stash"}),
    Case(SMALL, 1, 8, 2, {"schedule": "two-pass"}),
    Case(SMALL, 1, 8, 1, recompute="full"),
    Case(LARGER, 1, 8, 1),
    Case("ViT-S-16-alt", 1, 4, 1),
    Case("ViT-M-32-alt", 1, 8, 1),
    Case("ViT-B-16-SigLIP", 1, 2, 1),
    Case("PE-Core-S-16-384", 1, 2, 1),
    Case(SMALL, 2, 8, 1),
    Case(SMALL, 2, 8, 2, {"tensor": 2}),
    Case(SMALL, 2, 8, 2, {"tensor": 2, "sequence": True}),
    Case(SMALL, 2, 4, 4, {"pipeline": 2}),
    Case(SMALL, 2, 4, 4, {"pipeline": 2, "virtual_pipeline": 2}),
    Case(LARGER, 2, 4, 1),
    Case(LARGER, 2, 4, 2, {"tensor": 2}),
    Case("ViT-S-16-alt", 2, 2, 4, {"pipeline": 2}),
    Case("ViT-M-32-alt", 2, 4, 2, {"tensor": 2}),
    Case("PE-Core-S-16-384", 2, 2, 1),
]
QUICK = [Case(SMALL, 1, 2, 2)]


@dataclass(frozen=True)
class Row:
    """A comparison: seconds of a step, or pairs a second of a GPU."""

    model: str
    layout: str
    predicted: float
    measured: float
    detail: dict[str, Any]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="measured of each case")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not the clock's")
    parser.add_argument("--quick", action="store_true", help="one small case, no files")
    arguments = parser.parse_args()
    console = Console()
    load = os.getloadavg()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    cases = QUICK if arguments.quick else CASES
    published = [published_row(run) for run in RUNS]
    print_rows(console, "Published runs, pairs a second and GPU", published, "/s", "run")
    devices, here = {}, []
    for ranks in sorted({case.ranks for case in cases}):
        of_ranks = [case for case in cases if case.ranks == ranks]
        devices[ranks], rows = measure(of_ranks, arguments.steps, arguments.quick, clock)
        here += rows
        print_rows(console, "Seconds of a step on this machine", rows, "s", "case")
        # After each: a run that is stopped leaves what it has.
        results = {
            "environment": environment(),
            "load_average": load,
            "cpu_time": arguments.cpu_time,
            "steps": arguments.steps,
            "devices": devices,
            "here": [asdict(row) | {"error": row.error} for row in here],
            "published": [asdict(row) | {"error": row.error} for row in published],
        }
        if not arguments.quick:
            written = write_results("planned-time", results, draw(here, published))
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if not arguments.quick:
        print(*written, sep="\n")


# --------------------------------------------------------------------------------- this machine


def measure(
    cases: Sequence[Case], steps: int, quick: bool, clock: Clock
) -> tuple[dict[str, Any], list[Row]]:
    """The figures of this machine with as many processes as the cases have, and the cases' rows."""
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, cases, steps, quick, clock, Path(folder)
        torch.multiprocessing.spawn(_serve, arguments, nprocs=ranks)
        tree, seconds = pickle.loads(Path(folder, "0.pickle").read_bytes())
    device, rows = device_from_dict(tree, f"calibration of {ranks} processes"), []
    for case, of_case in zip(cases, seconds, strict=True):
        architecture, config = load_architecture(case.model), case.config()
        plan = make_layout_plan(architecture.costs, ranks, config)
        found = predict_step(plan, architecture, config, device, nodes_of=ranks)
        predicted = found.seconds
        if clock is time.process_time:
            predicted = found.compute + found.loss + found.optimizer
        detail = asdict(case) | {"steps": of_case, "parts": asdict(found)}
        rows.append(Row(_title(case), case.name, predicted, min(of_case), detail))
    return tree, rows


def _title(case: Case) -> str:
    return f"{case.model} {case.precision} x {case.ranks}"


def _serve(
    rank: int,
    ranks: int,
    cases: Sequence[Case],
    steps: int,
    quick: bool,
    clock: Clock,
    folder: Path,
) -> None:
    """Calibrate, then time the steps of each case, in groups of its own."""
    torch.set_num_threads(1)
    seconds, tree = [], None
    for number, case in enumerate([None, *cases]):
        store = dist.FileStore(str(folder / f"meet-{number}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        launch = Launch(rank, rank, ranks, ranks)
        join_world(launch)
        if case is None:
            tree = measure_device(make_groups(Layout(ranks)), launch, quick, clock)
        else:
            architecture, config = load_architecture(case.model), case.config()
            plan = make_layout_plan(architecture.costs, ranks, config)
            groups = make_groups(plan.layout)
            seconds.append(timed_steps(config, architecture, plan, groups, steps, clock))
            if rank == 0:
                print(f"{_title(case)}, {case.name}: {seconds[-1]}", file=sys.stderr, flush=True)
        close_groups()
    if rank == 0:
        Path(folder, "0.pickle").write_bytes(pickle.dumps((tree, seconds)))


# -------------------------------------------------------------------------------- published runs


def published_row(run: PublishedRun) -> Row:
    found = predicted_run(run)
    name = f"{run.gpus} {run.gpu.upper()} x {run.pairs}" + " (fitted)" * run.fitted
    detail = asdict(run) | {"parts": asdict(found)}
    predicted, measured = found.samples_per_second, run.samples_per_second
    return Row(run.model, name, predicted / run.gpus, measured / run.gpus, detail)


def predicted_run(run: PublishedRun) -> StepTime:
    config = _config(run.model, run.gpus * run.pairs, run.pairs, "bf16", run.recompute, {})
    architecture = load_architecture(run.model)
    plan = make_layout_plan(architecture.costs, run.gpus, config)
    return predict_step(plan, architecture, config, read_device(run.gpu), run.nodes_of)


def _config(
    model: str, pairs: int, micro: int, precision: str, recompute: str, parallel: dict[str, Any]
) -> Config:
    return config_from_dict(
        {
            "model": {"name": model},
            "batch": {"global": pairs, "micro": micro},
            "precision": precision,
            "recompute": recompute,
            "parallel": parallel,
            "train": {"steps": 1},
            "schedule": {"warmup": 0},
            "data": {"train": [{"shards": "none.tar"}]},
        }
    )


# ------------------------------------------------------------------------------------- reporting


def print_rows(console: Console, title: str, rows: Sequence[Row], unit: str, what: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column(what)
    for column in (f"predicted {unit}", f"measured {unit}", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = f"{row.predicted:.4g}", f"{row.measured:.4g}", f"{row.error:+.0%}"
        table.add_row(row.model, row.layout, *figures)
    console.print(table)
    errors = [abs(row.error) for row in rows]
    console.print(f"median error {statistics.median(errors):.0%}, largest {max(errors):.0%}")


def draw(here: Sequence[Row], published: Sequence[Row]) -> Figure:
    """Predicted over measured; on the line they are equal."""
    figure = Figure(figsize=(10, 4.5))
    panels = ("This machine: seconds of a step", here), ("Published: pairs/s and GPU", published)
    for axes, (title, rows) in zip(figure.subplots(1, 2), panels, strict=True):
        ends = [f([g for r in rows for g in (r.measured, r.predicted)]) for f in (min, max)]
        axes.plot(ends, ends, color="grey", linewidth=1)
        for model in dict.fromkeys(row.detail["model"] for row in rows):
            of_model = [row for row in rows if row.detail["model"] == model]
            points = [row.measured for row in of_model], [row.predicted for row in of_model]
            axes.plot(*points, "o", label=model)
        axes.set(title=title, xlabel="measured", ylabel="predicted", xscale="log", yscale="log")
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
