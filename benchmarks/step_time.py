"""Time of one optimizer step: OpenCLIP and parallel_clip, the same model and batch, one process.

    python benchmarks/step_time.py [--models ViT-B-32 ViT-S-32-alt] [--rounds 24] [--batch 16]

A round times one step of each, in an order that alternates, so that what slows the machine for a
while slows both; the figure is the median over rounds of the ratio of the two times. bf16 is
compared with OpenCLIP's `amp_bf16`. A step is forward, loss, backward, AdamW and the clamp of
logit_scale; ours also takes the gradient's norm. Data loading is in neither. Prints a table and
writes JSON and a picture to benchmarks/results.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from common import describe, environment, write_results
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from parallel_clip.config import Optimizer
from parallel_clip.engine.device import synchronize
from parallel_clip.engine.groups import Groups, close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import NOTHING_FROZEN, FrozenParts
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.optimizer.train_state import build_train_state
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.stages.partition import partition
from parallel_clip.training.step import TrainStep

LR, BETAS, EPS, WEIGHT_DECAY = 5e-4, (0.9, 0.98), 1e-6, 0.2
WARMUP_ROUNDS = 2
TARGET = 1.05

Step = Callable[[], float]  # runs one step and returns its loss


@dataclass(frozen=True)
class Timing:
    """Seconds of each round's two steps, and the loss of each one's first step."""

    model: str
    precision: str
    open_clip: list[float]
    parallel_clip: list[float]
    first_losses: tuple[float, float]

    @property
    def ratios(self) -> list[float]:
        return [
            ours / theirs for ours, theirs in zip(self.parallel_clip, self.open_clip, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        return {
            "model": self.model,
            "precision": self.precision,
            "ratio_median": middle,
            "ratio_quartiles": [low, high],
            "open_clip_seconds": self.open_clip,
            "parallel_clip_seconds": self.parallel_clip,
            "first_losses": {"open_clip": self.first_losses[0], "ours": self.first_losses[1]},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ViT-S-32-alt", "ViT-B-32"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=24, help="paired steps")
    parser.add_argument("--batch", type=int, default=16, help="pairs; one microbatch")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    join_world(Launch(rank=0, local_rank=0, world_size=1))
    groups = make_groups(Layout(world=1))
    timings: list[Timing] = []
    for name in arguments.models:
        for precision in arguments.precisions:
            architecture = load_architecture(name)
            timings.append(
                measure(architecture, precision, arguments.batch, arguments.rounds, groups)
            )
            gc.collect()  # the models are in cycles of references
        # After each model: a run that is stopped leaves what it has.
        results = {
            "environment": environment(),
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "timings": [timing.as_dict() for timing in timings],
        }
        written = write_results("step-time", results, draw(timings, results))
    print_table(timings, results)
    for path in written:
        print(path)
    close_groups()


def measure(
    architecture: Architecture, precision: str, batch: int, rounds: int, groups: Groups
) -> Timing:
    images, texts = random_batch(architecture, batch, groups.device)
    theirs, weights = open_clip_step(architecture, precision, images, texts, groups.device)
    ours = parallel_clip_step(architecture, precision, images, texts, weights, groups)
    first_losses = (theirs(), ours())
    seconds: dict[Step, list[float]] = {theirs: [], ours: []}
    label = f"{architecture.name} {precision}"
    for number in track(range(WARMUP_ROUNDS + rounds), description=label):
        for step in (theirs, ours) if number % 2 else (ours, theirs):
            elapsed = time_of(step)
            if number >= WARMUP_ROUNDS:
                seconds[step].append(elapsed)
    return Timing(architecture.name, precision, seconds[theirs], seconds[ours], first_losses)


def time_of(step: Step) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def random_batch(
    architecture: Architecture, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Noise as pictures [b, 3, H, W]; texts [b, L], each ended somewhere by the highest id."""
    generator = torch.Generator().manual_seed(0)
    text = architecture.text
    images = torch.randn(batch, 3, *architecture.vision.image_size, generator=generator)
    texts = torch.randint(1, text.vocab_size - 1, (batch, text.context_length), generator=generator)
    ends = torch.randint(1, text.context_length, (batch,), generator=generator)
    texts[torch.arange(batch), ends] = text.vocab_size - 1
    return images.to(device), texts.to(device)


def open_clip_step(
    architecture: Architecture,
    precision: str,
    images: Tensor,
    texts: Tensor,
    device: torch.device,
    lock_image: bool = False,
) -> tuple[Step, dict[str, Tensor]]:
    """OpenCLIP's trainer in one process, and the weights that it starts from. lock_image: its
    --lock-image."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**architecture.json).to(device)
    if lock_image:
        model.lock_image_tower()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    loss_function = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(open_clip_groups(model), lr=LR, betas=BETAS, eps=EPS)

    def step() -> float:
        # Our CPU seam is a torch-function mode for the whole process; OpenCLIP must not pay for it.
        with torch._C.DisableTorchFunction():
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_function(*model(images, texts))
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            return loss.item()

    return step, weights


def open_clip_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    def is_exempt(name: str, parameter: Tensor) -> bool:
        kinds = ("bn", "ln", "bias", "logit_scale")
        return parameter.ndim < 2 or any(kind in name for kind in kinds)

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if is_exempt(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not is_exempt(n, p)], "weight_decay": WEIGHT_DECAY},
    ]


def parallel_clip_step(
    architecture: Architecture,
    precision: str,
    images: Tensor,
    texts: Tensor,
    weights: dict[str, Tensor],
    groups: Groups,
    frozen: FrozenParts = NOTHING_FROZEN,
) -> Step:
    """Our own training step with one microbatch, from the same weights."""
    settings = Optimizer(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    stages = partition(architecture.costs, 1)
    options = ModelOptions(precision)
    built = build_train_state(architecture, options, stages, groups, settings, frozen=frozen)
    for parameter, tensor in built.global_parameters():
        built.set_weight(tensor, weights[parameter.name])
    step = TrainStep(built, ClipLoss(group=groups.data), 1, groups.pipeline)
    inputs = StepInputs([texts], lambda _: Pictures(images))
    return lambda: step(inputs, LR).record.loss


def print_table(timings: list[Timing], results: dict[str, Any]) -> None:
    table = Table(title=f"One optimizer step, {results['batch']} pairs, {results['rounds']} rounds")
    for column in ("model", "precision", "open_clip ms", "ours ms", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for timing in timings:
        low, ratio, high = statistics.quantiles(timing.ratios, n=4)
        table.add_row(
            timing.model,
            timing.precision,
            f"{1000 * statistics.median(timing.open_clip):.1f}",
            f"{1000 * statistics.median(timing.parallel_clip):.1f}",
            f"[{'green' if ratio <= TARGET else 'red'}]{ratio:.3f}",
            f"{low:.2f} to {high:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(describe(results["environment"]), style="dim", highlight=False)


def draw(timings: list[Timing], results: dict[str, Any]) -> Figure:
    """The spread of the paired ratios, one box a model and precision."""
    figure = Figure(figsize=(7, 1.2 + 0.6 * len(timings)))
    axes = figure.subplots()
    labels = [f"{timing.model}\n{timing.precision}" for timing in timings]
    axes.boxplot([t.ratios for t in timings], orientation="horizontal", tick_labels=labels)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.axvline(TARGET, color="tab:red", linewidth=0.8, linestyle="--", label=f"bar {TARGET}")
    axes.set_xlabel("time of a step, parallel_clip / open_clip (paired rounds)")
    axes.invert_yaxis()
    axes.legend(loc="best")
    figure.text(0.01, 0.01, describe(results["environment"]), fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


if __name__ == "__main__":
    main()
