"""Time and memory of the contrastive losses beside others', in one run.

    python benchmarks/loss.py [--rounds 15] [--quick]

Forward and backward of the loss alone, features given, over gloo in 1 to 4 processes of one
thread each: OpenCLIP's InfoNCE with `local_loss` and `gather_with_grad`, OpenCLIP's sigmoid loss, a
ring in both directions in plain torch, and ours with logits kept, in tiles, and streamed. All are
timed in each round, in turn; a ratio is of the same round, and medians with quartiles are shown.
With more processes than cores the ratio still compares the same work. Memory is the peak of what
lives beside the inputs on rank 0, counted. Then two stages of a pipeline: the last one alone at the
loss, and both, its features sent to the other and all gradients summed over both. Prints tables,
writes JSON and a picture to benchmarks/results. Exit code 1 where ours misses a bar. `--quick` is
two small sizes, and prints only. What duplicates and label smoothing cost: loss_options.py.
"""

from __future__ import annotations

import argparse
import gc
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import describe, environment, write_results
from loss_peers import losses_of
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel_clip.loss import ClipLoss
from parallel_clip.plan.peak_bytes import PeakBytes

SIZES = [(256, 512), (1024, 512), (1024, 1280), (2048, 512)]  # b, D
PROCESSES = [1, 2, 3, 4]
LARGE = 1024, 512  # the bars hold from these sizes on
STAGES = 2
STAGE_SIZES = [(256, 512), (512, 512), (1024, 512), (2048, 512), (4096, 512)]

# The largest share of the peer's time: from LARGE on, and below it.
BARS = {"stored": (0.67, 1.1), "tiled": (0.8, 1.1), "sigmoid": (1.0, 1.1)}
BARS |= {f"{loss}, no duplicates": (1.02, 1.2) for loss in tuple(BARS)}
PEERS = {"stored": "open_clip", "tiled": "open_clip", "streamed": "open_clip",
         "sigmoid": "open_clip sigmoid"}  # fmt: skip


# (rank, processes, pairs, width) -> losses by name
Losses = Callable[[int, int, int, int], dict[str, Callable[..., Tensor]]]


class Measured(NamedTuple):
    """Seconds of each round, and the peak bytes beside the inputs."""

    seconds: list[float]
    peak: int


@dataclass(frozen=True)
class Row:
    processes: int
    pairs: int
    width: int
    loss: str
    seconds: float
    peak: int
    ratio: float | None  # to its peer's, median of rounds
    quartiles: tuple[float, float] | None

    @property
    def bar(self) -> float | None:
        if self.loss not in BARS or self.ratio is None:
            return None
        large = self.pairs >= LARGE[0] and self.width >= LARGE[1]
        return BARS[self.loss][0 if large else 1]

    @property
    def missed(self) -> bool:
        return self.bar is not None and self.ratio > self.bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two small sizes, no files")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)

    sizes = [(64, 32), (128, 48)] if arguments.quick else SIZES
    rounds = 2 if arguments.quick else arguments.rounds
    rows: list[Row] = []
    for processes in PROCESSES[:2] if arguments.quick else PROCESSES:
        for (pairs, width), found in zip(sizes, run(processes, sizes, rounds), strict=True):
            of_size = rows_of(processes, pairs, width, found, PEERS)
            print_table(console, of_size)
            rows += of_size
    stages = run_stages(sizes if arguments.quick else STAGE_SIZES, rounds)
    print_stages(console, stages)
    results = {
        "environment": environment(),
        "rounds": rounds,
        "stages": stages,
        "rows": [asdict(row) | {"bar": row.bar} for row in rows],
    }
    console.print(describe(results["environment"]), style="dim", highlight=False)
    if arguments.quick:
        return 0
    for path in write_results("loss", results, draw(rows, results)):
        print(path)
    for row in rows:
        if row.missed:
            console.print(
                f"[red]{row.loss}, {row.processes} processes, b {row.pairs}, D {row.width}: "
                f"{row.ratio:.3f} of {PEERS[row.loss]}'s time, above the bar of {row.bar}"
            )
    return 1 if any(row.missed for row in rows) else 0


# ------------------------------------------------------------------------------------ measuring


def run(
    processes: int, sizes: Sequence[tuple[int, int]], rounds: int, losses: Losses = losses_of
) -> list[dict[str, Measured]]:
    """For each size, by name of the loss, what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = processes, sizes, rounds, losses, folder
        torch.multiprocessing.spawn(_measure, arguments, nprocs=processes)
        return pickle.loads((Path(folder) / "found.pickle").read_bytes())


def _measure(
    rank: int,
    processes: int,
    sizes: Sequence[tuple[int, int]],
    rounds: int,
    losses: Losses,
    folder: str,
) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that OpenCLIP uses
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    found = [_measure_size(rank, processes, *size, rounds, losses) for size in sizes]
    if rank == 0:
        (Path(folder) / "found.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_stages(sizes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """For each size, the time of a loss that two stages share beside that of the last one alone."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure_stages, (sizes, rounds, folder), nprocs=STAGES)
        return pickle.loads((Path(folder) / "found.pickle").read_bytes())


def _measure_stages(rank: int, sizes: Sequence[tuple[int, int]], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=STAGES
    )
    alone = [dist.new_group([r]) for r in range(STAGES)][rank]
    last = STAGES - 1
    by_one = ClipLoss(group=alone)
    by_both = ClipLoss(group=alone, helpers=dist.group.WORLD)
    found = []
    for pairs, width in sizes:
        torch.manual_seed(0)
        features = F.normalize(torch.randn(2, pairs, width), dim=-1)

        def one(features: Tensor = features) -> None:
            if rank == last:
                _forward_backward(by_one, features)

        def both(features: Tensor = features) -> None:
            received = features.clone() if rank == last else torch.empty_like(features)
            dist.broadcast(received, last)
            _forward_backward(by_both, received)

        ratios = []
        for measured_round in range(-1, rounds):
            times = [_timed(work) for work in (one, both)]
            if measured_round >= 0:
                ratios.append(times[1] / times[0])
        found.append({"pairs": pairs, "width": width, "ratio": statistics.median(ratios)})
    if rank == last:
        (Path(folder) / "found.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _timed(work: Callable[[], None]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def _measure_size(
    rank: int, processes: int, pairs: int, width: int, rounds: int, losses_of: Losses
) -> dict[str, Measured]:
    torch.manual_seed(rank)
    features = F.normalize(torch.randn(2, pairs, width), dim=-1)
    losses = losses_of(rank, processes, pairs, width)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for measured_round in range(-1, rounds):  # the first one warms up
        for name, loss in losses.items():
            taken = _timed(partial(_forward_backward, loss, features))
            if measured_round >= 0:
                seconds[name].append(taken)
    found = {}
    for name, loss in losses.items():
        gc.collect()
        with PeakBytes(features) as live:
            _forward_backward(loss, features)
        found[name] = Measured(seconds[name], live.peak)
    return found


def _forward_backward(loss: Callable[..., Tensor], features: Tensor) -> None:
    images, texts = (f.detach().requires_grad_() for f in features)
    scale, bias = torch.tensor(30.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss(images, texts, scale, bias).backward()


def rows_of(
    processes: int, pairs: int, width: int, found: dict[str, Measured], peers: dict[str, str]
) -> list[Row]:
    rows = []
    for name, measured in found.items():
        ratio = quartiles = None
        if name in peers:
            theirs = found[peers[name]].seconds
            ratios = [a / b for a, b in zip(measured.seconds, theirs, strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            quartiles = low, high
        seconds = statistics.median(measured.seconds)
        rows.append(Row(processes, pairs, width, name, seconds, measured.peak, ratio, quartiles))
    return rows


# ------------------------------------------------------------------------------------ reporting


def print_table(console: Console, rows: Sequence[Row]) -> None:
    first = rows[0]
    table = Table(
        title=f"{first.processes} processes, b = {first.pairs}, B = "
        f"{first.processes * first.pairs}, D = {first.width}",
        title_justify="left",
    )
    table.add_column("loss")
    for column in ("ms", "of the peer's", "quartiles", "bar", "peak MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = quartiles = ""
        if row.ratio is not None:
            ratio = f"[{'red' if row.missed else 'green'}]{row.ratio:.3f}"
            quartiles = f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}"
        table.add_row(
            row.loss,
            f"{1000 * row.seconds:.1f}",
            ratio,
            quartiles,
            "" if row.bar is None else str(row.bar),
            f"{row.peak / 2**20:.1f}",
        )
    console.print(table)


def print_stages(console: Console, stages: Sequence[dict[str, Any]]) -> None:
    for found in stages:
        console.print(
            f"b = B = {found['pairs']}, D = {found['width']}: two stages take "
            f"{found['ratio']:.3f} of the last one's time alone"
        )


def draw(rows: Sequence[Row], results: dict[str, Any]) -> Figure:
    """Time and memory against the global batch, for the sizes with D = 512."""
    figure = Figure(figsize=(13, 4.8))
    panels = figure.subplots(1, 2)
    of_width = [row for row in rows if row.width == LARGE[1]]
    for number, name in enumerate(dict.fromkeys(row.loss for row in of_width)):
        of_loss = sorted(
            (row for row in of_width if row.loss == name and row.pairs == LARGE[0]),
            key=lambda row: row.processes,
        )
        style = "o--" if name.startswith(("open_clip", "ring")) else "o-"
        batches = [row.processes * row.pairs for row in of_loss]
        for axes, values in (
            (panels[0], [1000 * row.seconds for row in of_loss]),
            (panels[1], [row.peak / 2**20 for row in of_loss]),
        ):
            axes.plot(batches, values, style, color=f"C{number}", label=name)
    for axes, title in zip(panels, ("milliseconds", "peak MiB beside the inputs"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(f"global batch B, {LARGE[0]} pairs on each process")
        axes.set_title(f"{title}, D = {LARGE[1]}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.text(0.12, -0.04, describe(results["environment"]), fontsize=7, color="grey")
    return figure


if __name__ == "__main__":
    sys.exit(main())
