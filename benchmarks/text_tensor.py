"""What a text tower that runs whole on each tensor rank, over its share of the pairs, could gain.

    python benchmarks/text_tensor.py [--rounds 5] [--model-only]

DistMM (NSDI '24) gives each tower its own parallelism. Two answers:

- by the planner's time model, for the recipes on 8 and 128 GPUs of 80 and of 40 GB: the quickest
  layout as it is, and the quickest if the text tower of layouts with tensor parallelism sent
  nothing and multiplied whole matrices. More pairs for less memory, sums of gradients over more
  ranks and the exchange of features are left out, so that this is an upper bound;
- measured on two processes of one thread: a step of a model that is nearly all text tower, split by
  heads, and split by pairs. The same work, whichever way it is split.

Prints tables and writes JSON to benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import describe, environment, write_results
from rich.console import Console
from rich.table import Table
from scaling_model import CONFIGS, RECIPES, fitting_layouts, layout_search

from parallel_clip.config import config_from_dict, load_config, parse_bytes
from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan import step_time
from parallel_clip.plan.device_file import read_device
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.timed_step import timed_steps
from parallel_clip.plan.tower_time import How, TowerTime, tower_time

DEVICE, GPUS, MEMORIES, BATCH = "h100", (8, 128), ("80GB", "40GB"), 65_536
TOWER = {"width": 512, "layers": 6}
TEXT_MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"width": 64, "layers": 1, "head_width": 32, "image_size": 32, "patch_size": 16},
    "text_cfg": {**TOWER, "heads": 8, "context_length": 77, "vocab_size": 4096},
}
PAIRS = 16
WAYS = {"split by heads": Layout(2, tensor=2, sequence=True), "split by pairs": Layout(2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each way")
    parser.add_argument("--model-only", action="store_true", help="nothing is measured")
    arguments = parser.parse_args()
    console = Console(width=120)
    rows = [
        bound(recipe, overrides, gpus, memory)
        for recipe, overrides in RECIPES[1:]
        for gpus in GPUS
        for memory in MEMORIES
    ]
    print_bounds(console, rows)
    results: dict[str, Any] = {"environment": environment(), "bounds": rows}
    if not arguments.model_only:
        results["measured"] = measured = measure(arguments.rounds)
        heads, pairs = (statistics.median(measured[way]) for way in WAYS)
        console.print(
            f"Measured, two processes, {PAIRS} texts: {heads:.3f} s split by heads, {pairs:.3f} s "
            f"split by pairs, {pairs / heads:.2f} of it"
        )
    console.print(describe(results["environment"]), style="dim", highlight=False)
    for path in write_results("text-tensor", results):
        print(path)


# ---------------------------------------------------------------------------------- by the model


def bound(recipe: str, overrides: list[str], gpus: int, memory: str) -> dict[str, Any]:
    """The quickest layouts as they are, with any tensor size and with one above 1, and the quickest
    of the latter if its text tower were whole."""
    config = load_config(CONFIGS / recipe, [*overrides, f"batch.global={BATCH}"])
    device = read_device(DEVICE)
    search = layout_search(config, gpus, device, parse_bytes(memory))
    fitting = list(fitting_layouts(search, config))
    quickest = min(fitting, key=lambda found: found.time.seconds)
    split = [found for found in fitting if found.plan.layout.tensor > 1]
    with mock.patch.object(step_time, "tower_time", whole_text_tower):
        whole = [search.predict(found.plan, config=found.config).seconds for found in split]
    return {
        "model": config.model.name,
        "gpus": gpus,
        "memory": memory,
        "quickest": quickest.time.seconds,
        "tensor": quickest.plan.layout.tensor,
        "split": min(found.time.seconds for found in split),
        "whole_text": min(whole),
    }


def whole_text_tower(tower: Any, costs: Any, how: How) -> TowerTime:
    """As `tower_time`, but for a text tower: whole matrices, a share of the pairs, no messages."""
    if hasattr(tower, "vocab_size") and how.tensor > 1:
        pairs = -(-how.pairs // how.tensor)
        how = replace(how, pairs=pairs, tensor=1, sequence=False)
    return tower_time(tower, costs, how)


def print_bounds(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Seconds of a step, by the time model", title_justify="left")
    columns = "model", "GPUs", "memory", "quickest", "its tensor size", "with tensor >= 2"
    for column in (*columns, "and whole text tower", "gain", "against the quickest"):
        table.add_column(column, justify="right")
    for row in rows:
        split, whole = row["split"], row["whole_text"]
        table.add_row(
            row["model"], f"{row['gpus']}", row["memory"], f"{row['quickest']:.2f}",
            str(row["tensor"]), f"{split:.2f}", f"{whole:.2f}", f"{1 - whole / split:.1%}",
            f"{whole / row['quickest'] - 1:+.1%}",
        )  # fmt: skip
    console.print(table)


# -------------------------------------------------------------------------------------- measured


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of steps, way by way in turn."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (rounds, folder), nprocs=2)
        return torch.load(f"{folder}/seconds.pt")


def _serve(rank: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    architecture = architecture_from_json(TEXT_MODEL, "text")
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(2 * rounds):
        way = list(WAYS)[number % 2]
        layout = WAYS[way]
        store = dist.FileStore(str(Path(folder, f"meet-{number}")), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        join_world(Launch(rank, rank, 2, 2))
        parallel = {"tensor": layout.tensor, "sequence": layout.sequence}
        config = config_from_dict(
            {
                "batch": {"global": PAIRS, "micro": PAIRS // layout.data},
                "parallel": parallel | {"distributed_optimizer": False},
                "precision": "fp32",
                "train": {"steps": 1},
                "data": {"train": [{"shards": "none.tar"}]},
            }
        )
        plan = make_layout_plan(architecture.costs, 2, config)
        found[way] += timed_steps(config, architecture, plan, make_groups(layout), 2)
        close_groups()
    if rank == 0:
        torch.save(found, f"{folder}/seconds.pt")


if __name__ == "__main__":
    main()
