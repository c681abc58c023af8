"""Time of a step whose image tower is locked (LiT), beside OpenCLIP's own and a full step.

    python benchmarks/locked_tower.py [--model ViT-B-32] [--rounds 12] [--batch 16]

A round times one step of each of three: OpenCLIP with `--lock-image`, ours with `freeze.vision:
all` and ours with all of it trained, in an order that turns; the figures are medians over rounds of
the ratios of the times. One process, one microbatch, fp32; see step_time.py for what a step is.
Prints a table and writes JSON and a picture to benchmarks/results.
"""

import argparse
import statistics

import torch
from common import describe, environment, write_results
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_time import open_clip_step, parallel_clip_step, random_batch, time_of

from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.model.frozen import FrozenParts, freeze_tower
from parallel_clip.model.known_models import load_architecture

WARMUP_ROUNDS = 2
BARS = {"OpenCLIP's locked step": 1.05, "our full step": 0.75}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each")
    parser.add_argument("--batch", type=int, default=16, help="pairs; one microbatch")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    join_world(Launch(rank=0, local_rank=0, world_size=1))
    groups = make_groups(Layout(world=1))

    architecture = load_architecture(arguments.model)
    batch = random_batch(architecture, arguments.batch, groups.device)
    theirs, weights = open_clip_step(architecture, "fp32", *batch, groups.device, lock_image=True)
    frozen = FrozenParts(vision=freeze_tower(architecture, "vision"))
    locked = parallel_clip_step(architecture, "fp32", *batch, weights, groups, frozen)
    full = parallel_clip_step(architecture, "fp32", *batch, weights, groups)
    steps = {"OpenCLIP's locked step": theirs, "our locked step": locked, "our full step": full}
    first_losses = {name: step() for name, step in steps.items()}

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in track(range(WARMUP_ROUNDS + arguments.rounds), description=arguments.model):
        names = list(steps)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = time_of(steps[name])
            if number >= WARMUP_ROUNDS:
                seconds[name].append(elapsed)
    ratios = {
        name: [a / b for a, b in zip(seconds["our locked step"], seconds[name], strict=True)]
        for name in BARS
    }
    results = {
        "environment": environment(),
        "model": arguments.model,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "first_losses": first_losses,
        "seconds": seconds,
        "ratio_quartiles": {name: statistics.quantiles(r, n=4) for name, r in ratios.items()},
    }
    written = write_results("locked-tower", results, draw(ratios, results))
    print_table(results)
    for path in written:
        print(path)
    close_groups()


def print_table(results: dict) -> None:
    title = f"A step with a locked image tower, {results['model']}, {results['batch']} pairs"
    table = Table(title=title)
    for column in ("beside", "ratio", "quartiles", "bar"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for name, (low, ratio, high) in results["ratio_quartiles"].items():
        colour = "green" if ratio <= BARS[name] else "red"
        quartiles = f"{low:.2f} to {high:.2f}"
        table.add_row(name, f"[{colour}]{ratio:.3f}", quartiles, f"{BARS[name]}")
    console = Console()
    console.print(table)
    console.print(describe(results["environment"]), style="dim", highlight=False)


def draw(ratios: dict[str, list[float]], results: dict) -> Figure:
    figure = Figure(figsize=(7, 2.4))
    axes = figure.subplots()
    axes.boxplot(list(ratios.values()), orientation="horizontal", tick_labels=list(ratios))
    for place, name in enumerate(ratios, start=1):
        axes.plot([BARS[name]] * 2, [place - 0.3, place + 0.3], color="tab:red", linestyle="--")
    axes.set_xlabel("time of our locked step / that of ... (dashed: the bar)")
    axes.set_title(f"{results['model']}, image tower locked", fontsize=9)
    figure.text(0.01, 0.01, describe(results["environment"]), fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


if __name__ == "__main__":
    main()
