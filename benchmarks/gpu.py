"""A step on one GPU in bf16: ours with each of its switches against OpenCLIP's.

    python benchmarks/gpu.py [--models ViT-L-14 ViT-g-14] [--micro 32 64] [--microbatches 4]
                             [--rounds 20] [--only WORD ...] [--peak-tflops N] [--deterministic]
    python benchmarks/gpu.py --rehearse      # the same code on the CPU: a tiny model, no files

OpenCLIP runs in amp_bf16 with fused AdamW and its ClipLoss, eager and compiled, with and without
gradient checkpointing, on the whole batch at once or with its own accumulation. Each subject is
built alone, which gives its peak memory, and then timed in turns with eager OpenCLIP, by CUDA
events; figures are medians over rounds. What does not fit is a row that says so.

MFU = FLOPs of a pair x pairs / (seconds x peak), FLOPs by hand and without recomputation
(gpu_measure.py:flops_per_pair). "MFU" is of the peak of the card's data sheet, "matmul" of the best
that a matrix product reached here; "counted" is the peak memory by --dry-run's own arithmetic
(gpu_counted.py), "ratio" the time divided by eager OpenCLIP's. Three steps of some subjects are
profiled.

Prints tables; writes JSON and a picture to benchmarks/results after each model and batch.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

import torch
from common import describe, environment, write_results
from gpu_counted import CountedPeaks, counted_peaks
from gpu_measure import (
    PEAKS,
    Row,
    describe_card,
    flops_per_pair,
    in_short,
    measure,
    measured_peak,
    utilization,
)
from gpu_subjects import Case, subjects
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parallel_clip.engine import device as device_seam
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 64, "heads": 4, "layers": 2},
}
# Environment variables that change what is measured begin with one of these.
NOTED = ("PYTORCH_", "TORCH", "NCCL_", "CUBLAS_", "CUDA_", "NVIDIA_TF32")

Results = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ViT-L-14"])
    parser.add_argument("--micro", nargs="+", type=int, default=[32], help="pairs a microbatch")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="subjects whose names hold a word")
    parser.add_argument("--peak-tflops", type=float, help="of the card, dense bf16")
    parser.add_argument("--deterministic", action="store_true", help="as in a config")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; writes nothing")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        arguments.micro, arguments.rounds, arguments.microbatches = [4], 2, 2
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --rehearse runs a tiny model on the CPU")
    if arguments.deterministic:
        device_seam.make_deterministic()
    console = Console(width=max(120, Console().width))  # a file has 80 columns, too few
    results = benchmark(arguments, console)
    print_tables(results, console)


def benchmark(arguments: argparse.Namespace, console: Console) -> Results:
    """Measure all cases. Written after each: a run that is stopped leaves what it has."""
    # Before this process joins a process group. A count that fails must not cost the hour.
    try:
        counted = counted_peaks(models(arguments), arguments.micro, arguments.microbatches)
    except Exception as error:
        console.print(f"the peaks could not be counted: {in_short(error)}")
        counted = {}
    join_world(Launch(rank=0, local_rank=0, world_size=1))
    groups = make_groups(Layout(world=1))
    card = describe_card()
    peak = arguments.peak_tflops and 1e12 * arguments.peak_tflops
    results: Results = {
        "environment": environment(),
        "card": card,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(NOTED)},
        "deterministic": arguments.deterministic,
        "rounds": arguments.rounds,
        "peak_flops": peak or PEAKS.get(card.get("name")),
        "matmul_flops": measured_peak(groups.device, 256 if arguments.rehearse else 8192),
        "cases": [],
    }
    # On a CPU, code would be compiled by a compiler of C++ that need not be there.
    first, *others = subjects("eager" if arguments.rehearse else "inductor")
    chosen = [s for s in (first, *others) if any(word in s.name for word in arguments.only)]
    for architecture in models(arguments):
        for micro in arguments.micro:
            case = Case(
                architecture, micro, arguments.microbatches, groups, arguments.deterministic
            )
            label = f"{architecture.name}, {arguments.microbatches} x {micro} pairs"
            rows = [
                measure(subject, first, case, arguments.rounds)
                for subject in track(chosen, description=label, console=console)
            ]
            results["cases"].append(case_results(case, rows, results, counted))
            if not arguments.rehearse:
                for path in write_results("gpu", results, draw(results)):
                    console.print(path)
    close_groups()
    return results


def models(arguments: argparse.Namespace) -> list[Architecture]:
    if arguments.rehearse:
        return [architecture_from_json(TINY, "tiny")]
    return [load_architecture(name) for name in arguments.models]


def case_results(
    case: Case, rows: list[Row], results: Results, counted: CountedPeaks
) -> dict[str, Any]:
    """A case as it is written, figures of each row included."""
    architecture = case.architecture
    found = []
    for row in rows:
        key = architecture.name, case.micro, row.subject
        figures: dict[str, Any] = {"counted_bytes": counted.get(key)}
        if row.seconds:
            figures |= {
                "median_seconds": row.median,
                "pairs_per_second": case.pairs / row.median,
                "ratio": row.ratio,
            }
            for name in ("peak_flops", "matmul_flops"):
                of = results[name]
                share = of and utilization(architecture, case.pairs, row.median, of)
                figures[f"share_of_{name}"] = share
        found.append(asdict(row) | figures)
    return {
        "model": architecture.name,
        "micro": case.micro,
        "microbatches": case.microbatches,
        "flops_per_pair": flops_per_pair(architecture, case.pairs),
        "rows": found,
    }


# ------------------------------------------------------------------------------- what is shown

COLUMNS = ("subject", "ms", "pairs/s", "MFU", "matmul", "GiB", "counted", "ratio", "first loss")


def print_tables(results: Results, console: Console) -> None:
    if not results["card"]:
        console.print("A rehearsal on the CPU: its figures say nothing about a GPU.")
    for case in results["cases"]:
        title = f"{case['model']}, {case['microbatches']} x {case['micro']} pairs, bf16"
        table = Table(title=title)
        for column in COLUMNS:
            is_name = column == "subject"
            table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
        for row in case["rows"]:
            table.add_row(*cells(row))
        console.print(table)
        for row in case["rows"]:
            if row["profile"] is not None:
                console.print(profile_table(row["subject"], row["profile"]))
            if row["profile_failed"] is not None:
                console.print(f"{row['subject']}: no profile, {row['profile_failed']}")
    gflops = {case["model"]: f"{case['flops_per_pair'] / 1e9:.1f}" for case in results["cases"]}
    console.print(f"GFLOPs a pair, forward and backward: {gflops}", highlight=False)
    best = f"{results['matmul_flops'] / 1e12:.3g} TFLOP/s in the best bf16 matrix product"
    console.print(best, results["card"] or "no GPU", highlight=False)
    console.print(describe(results["environment"]), style="dim", highlight=False)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table; figures that are not there are left empty."""
    memory, counted = (
        "" if peak is None else f"{peak / 2**30:.2f}"
        for peak in (row["peak_bytes"], row["counted_bytes"])
    )
    first = "" if row["first_loss"] is None else f"{row['first_loss']:.4f}"
    if row["failed"] is not None:
        return [row["subject"], row["failed"], "", "", "", memory, counted, "", first]
    shares = [row["share_of_peak_flops"], row["share_of_matmul_flops"]]
    return [
        row["subject"],
        f"{1000 * row['median_seconds']:.1f}",
        f"{row['pairs_per_second']:.1f}",
        *("" if share is None else f"{share:.1%}" for share in shares),
        memory,
        counted,
        "" if row["ratio"] is None else f"{row['ratio']:.3f}",
        first,
    ]


def profile_table(subject: str, profile: dict[str, Any]) -> Table:
    idle = profile["idle_share"]
    said = "no GPU" if idle is None else f"GPU idle {idle:.1%}"
    table = Table(title=f"{subject}: {said}, {profile['host_syncs']:.1f} host syncs a step")
    for column in ("kernel", "ms a step", "calls a step"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel in profile["top"]:
        time, calls = f"{kernel['milliseconds']:.2f}", f"{kernel['calls']:.1f}"
        table.add_row(kernel["name"][:90], time, calls)
    return table


def draw(results: Results) -> Figure:
    """Pairs a second and peak memory of each subject, a pair of panels a case."""
    cases = results["cases"]
    figure = Figure(figsize=(12, 1 + 4.5 * len(cases)))
    panels = figure.subplots(len(cases), 2, squeeze=False, sharey="row")
    for case, (speed, memory) in zip(cases, panels, strict=True):
        rows = case["rows"]
        names = [row["subject"] for row in rows]
        colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
        speed.barh(names, [row.get("pairs_per_second", 0) for row in rows], color=colours)
        memory.barh(names, [(row["peak_bytes"] or 0) / 2**30 for row in rows], color=colours)
        for number, row in enumerate(rows):
            if row["failed"] is not None:
                speed.text(0, number, f" {row['failed']}", va="center", fontsize=7)
        speed.invert_yaxis()
        speed.set_title(f"{case['model']}, {case['microbatches']} x {case['micro']} pairs")
        speed.set_xlabel("pairs a second")
        memory.set_xlabel("peak memory, GiB")
    foot = describe(results["environment"])
    figure.text(0.01, 0.005, foot, fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


if __name__ == "__main__":
    main()
