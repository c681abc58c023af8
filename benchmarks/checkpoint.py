"""Time of saving and loading a checkpoint, beside torch.distributed.checkpoint (DCP).

    python benchmarks/checkpoint.py [--model ViT-B-32] [--rounds 7] [--tensor 2] [--folder DIR]

The same state (fp32 masters and both moments of a model that `--tensor` processes share) is saved
and loaded by both, in an order that alternates. Both flush their files to disk; ours also hashes
them, and its load verifies every hash first. The pause is how long an asynchronous save keeps
training waiting; DCP's `async_save` copies to host memory and writes on a thread, as ours does.
Figures are medians over rounds. Prints a table and writes JSON and a picture to benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import describe, environment, write_results
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import Optimizer
from parallel_clip.engine.groups import Groups, close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.train_state import TrainState, build_train_state
from parallel_clip.stages.partition import partition

BARS = {"save": 1.1, "load": 1.5}  # ours by DCP's, at most
PAUSE_BAR = 0.2  # of the pause of an asynchronous save by a synchronous one, at most
FIGURES = ("save", "pause", "load")

Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tensor", type=int, default=2, help="processes that share the model")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ours, theirs, size = _run_processes(arguments, Path(folder))
    results = {
        "environment": environment(),
        "model": arguments.model,
        "tensor": arguments.tensor,
        "checkpoint_bytes": size,
        "parallel_clip_seconds": ours,
        "dcp_seconds": theirs,
        "ratios": {name: median(ours[name]) / median(theirs[name]) for name in FIGURES},
        "pause_of_save": {
            "parallel_clip": median(ours["pause"]) / median(ours["save"]),
            "dcp": median(theirs["pause"]) / median(theirs["save"]),
        },
    }
    print_table(results)
    for path in write_results("checkpoint", results, draw(results)):
        print(path)


def median(values: list[float]) -> float:
    return statistics.median(values)


def _run_processes(arguments: argparse.Namespace, folder: Path) -> tuple[Seconds, Seconds, int]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_measure_on_rank, args=(rank, port, arguments, folder, answers))
        for rank in range(arguments.tensor)
    ]
    for process in processes:
        process.start()
    answer = answers.get()
    for process in processes:
        process.join()
    return answer


def _measure_on_rank(rank: int, port: int, arguments, folder: Path, answers) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    join_world(Launch(rank, rank, arguments.tensor))
    groups = make_groups(Layout(arguments.tensor, tensor=arguments.tensor))
    state = build_state(arguments.model, groups)
    ours: Seconds = {name: [] for name in FIGURES}
    theirs: Seconds = {name: [] for name in FIGURES}
    for number in range(arguments.rounds + 1):  # the first is for warming up
        sides = [(measure_ours, ours), (measure_dcp, theirs)]
        for measure, seconds in sides if number % 2 else sides[::-1]:
            found = measure(state, groups, folder / f"{measure.__name__}_{number}")
            if number > 0:
                for name, value in found.items():
                    seconds[name].append(value)
    if rank == 0:
        table = parameter_table(load_architecture(arguments.model))
        answers.put((ours, theirs, 12 * sum(math.prod(p.shape) for p in table)))
    close_groups()


def build_state(model: str, groups: Groups) -> TrainState:
    """Masters and moments of random numbers, as after some steps."""
    architecture = load_architecture(model)
    stages = partition(architecture.costs, 1, 1, None)
    state = build_train_state(
        architecture, ModelOptions(precision="bf16"), stages, groups, Optimizer()
    )
    torch.manual_seed(groups.rank)
    for _, tensor in state.global_parameters():
        state.set_weight(tensor, torch.randn(tensor.shape))
        moments = {name: torch.rand(tensor.shape) for name in MOMENTS}
        state.optimizer.set_moments(tensor, moments, step=1)
    return state


def measure_ours(state: TrainState, groups: Groups, folder: Path) -> dict[str, float]:
    _on_rank_zero(groups, folder.mkdir)
    found = {}
    meta = Meta(1, 0, 0, "model", {}, {}, updates=1)
    found["save"] = timed(lambda: Checkpointer(folder, groups).save(meta, state))
    writer = Checkpointer(folder, groups, asynchronous=True)
    found["pause"] = timed(lambda: writer.save(Meta(2, 0, 0, "model", {}, {}, updates=2), state))
    writer.finish(last=True)
    reader, checkpoint = Checkpointer(folder, groups), commit.latest(folder)

    def load() -> None:
        reader.verify(checkpoint)
        reader.load(checkpoint, state)

    found["load"] = timed(load)
    _on_rank_zero(groups, lambda: shutil.rmtree(folder))
    return found


def measure_dcp(state: TrainState, groups: Groups, folder: Path) -> dict[str, float]:
    tensors = dict(_own_tensors(state, groups))
    found = {"save": timed(lambda: dcp.save(tensors, checkpoint_id=folder / "sync"))}
    pending = []
    found["pause"] = timed(
        lambda: pending.append(dcp.async_save(tensors, checkpoint_id=folder / "async"))
    )
    pending[0].result()
    dist.barrier()
    found["load"] = timed(lambda: dcp.load(tensors, checkpoint_id=folder / "async"))
    _on_rank_zero(groups, lambda: shutil.rmtree(folder))
    return found


def _own_tensors(state: TrainState, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes of masters and moments, under names of its own."""
    for parameter, tensor in state.global_parameters():
        if parameter.placement.axis is None and groups.tensor_rank != 0:
            continue
        owned = state.optimizer.owned_state(tensor)
        yield f"weight:{parameter.name}@{groups.rank}", owned.master
        for name, moment in owned.moments.items():
            yield f"{name}:{parameter.name}@{groups.rank}", moment


def timed(function: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    began = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - began


def _on_rank_zero(groups: Groups, function: Callable[[], object]) -> None:
    dist.barrier()
    if groups.is_rank_zero:
        function()
    dist.barrier()


def print_table(results: dict) -> None:
    table = Table(title=f"{results['model']}, {results['checkpoint_bytes'] / 1e9:.2f} GB")
    for column in ("", "parallel_clip", "DCP", "ratio", "bar"):
        table.add_column(column, justify="right")
    for name in FIGURES:
        ours = median(results["parallel_clip_seconds"][name])
        theirs = median(results["dcp_seconds"][name])
        bar = f"{BARS[name]}" if name in BARS else ""
        table.add_row(name, f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.2f}", bar)
    pause = results["pause_of_save"]
    table.add_row(
        "pause / save", f"{pause['parallel_clip']:.2f}", f"{pause['dcp']:.2f}", "", f"{PAUSE_BAR}"
    )
    console = Console()
    console.print(table)
    console.print(describe(results["environment"]))


def draw(results: dict) -> Figure:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    for offset, (key, label) in enumerate(
        (("parallel_clip_seconds", "parallel_clip"), ("dcp_seconds", "DCP"))
    ):
        places = [place + 0.35 * offset for place in range(len(FIGURES))]
        axes.bar(places, [median(results[key][name]) for name in FIGURES], 0.32, label=label)
    axes.set_xticks([place + 0.17 for place in range(len(FIGURES))], FIGURES)
    axes.set_ylabel("seconds, median")
    axes.set_title(f"{results['model']}, {results['checkpoint_bytes'] / 1e9:.2f} GB, two processes")
    axes.legend()
    figure.text(0, -0.04, describe(results["environment"]), fontsize=6)
    return figure


if __name__ == "__main__":
    main()
