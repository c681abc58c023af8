"""The sigmoid loss on weights that InfoNCE has trained: which start keeps them, and which does not.

    python benchmarks/sigmoid_start.py [--source-steps 400] [--steps 20 100 300] [--folder FOLDER]

Trains a small CLIP on the demo's pictures with InfoNCE at a multiplier of 100, at which published
weights are, and goes on from it with each of CASES, and with OpenCLIP's own model and SigLipLoss in
a plain loop. After so many steps OpenCLIP's model gives features of concepts that no training saw:
recall@1, and the cosines of pictures and texts that are no pair. Prints a table and writes JSON and
a picture to benchmarks/results. `--folder` keeps the runs, and goes on with those that are there.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import multiprocessing
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import open_clip
import torch
import webdataset
from common import describe, environment, write_results
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from parallel_clip.convert.open import open_source

ROOT = Path(__file__).parents[1]
DATA = ROOT / "launch/demo_data"
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 4},
}
BATCH, LEARNING_RATE, WARMUP = 64, 1e-4, 10
CONFIG = {
    "precision": "fp32",
    "batch": {"global": BATCH, "micro": BATCH},
    "optimizer": {"lr": LEARNING_RATE, "clip_grad_norm": 1.0},
    "schedule": {"kind": "constant", "warmup": WARMUP},
    "data": {
        "train": [{"shards": f"{DATA}/train-{{0000..0007}}.tar"}],
        "caption_lines": True,
        "augment_options": {"scale": [0.5, 1.0]},
        "workers": 0,
    },
    "checkpoint": {"keep": None},
    "log": {"every": 20},
}
SOURCE = ["init.logit_scale=100", "optimizer.lr_logit=0", "optimizer.lr=1.0e-3"]
SIGMOID = ["loss.kind=sigmoid"]
CASES = {
    "InfoNCE goes on": [],
    "sigmoid: bias measured": SIGMOID,
    "scale 10, bias -10": [*SIGMOID, "init.logit_scale=10", "init.logit_bias=-10"],
    "bias -10": [*SIGMOID, "init.logit_bias=-10"],
    "bias 0": [*SIGMOID, "init.logit_bias=0"],
    "measured, learning rate 3e-3": [*SIGMOID, "optimizer.lr=3.0e-3"],
}
FRESH = multiprocessing.get_context("forkserver")  # each run in a process of its own
FRESH.set_forkserver_preload(["parallel_clip.training.train", "parallel_clip.cli"])
OPEN_CLIP = "bias 0, by OpenCLIP alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 300])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = sorted(arguments.steps)
    with tempfile.TemporaryDirectory(prefix="sigmoid-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps(MODEL))
        (folder / "config.json").write_text(json.dumps(CONFIG))
        source = folder / "source"
        train(source, [f"model.name={folder}/model.json", *SOURCE], [arguments.source_steps])
        before = load(source, arguments.source_steps)
        cases: dict[str, list[dict[str, Any]]] = {}
        for name, overrides in track(CASES.items(), description="starts"):
            run = folder / name.replace(" ", "_")
            train(run, [f"init.from={source}", *overrides], steps)
            lines = (run / "metrics.jsonl").read_text().splitlines()
            cases[name] = [{"step": step, **look_at(load(run, step))} for step in steps]
            first = json.loads(lines[0])
            cases[name][0] |= {key: first[key] for key in ("loss", "logit_scale", "logit_bias")}
        cases[OPEN_CLIP] = open_clip_alone(before, steps)
        results = {
            "environment": environment(),
            "model": MODEL,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "source": {"steps": arguments.source_steps, **look_at(before)},
            "cases": cases,
        }
    written = write_results("sigmoid-start", results, draw(results))
    print_table(results)
    for path in written:
        print(path)


def train(run: Path, overrides: list[str], steps: list[int]) -> None:
    """Train into `run` and keep a checkpoint after each of `steps`."""
    lengths = [f"checkpoint.every={math.gcd(*steps)}", f"train.steps={max(steps)}"]
    words = ["train", f"{run.parent}/config.json", f"run_dir={run}", *lengths, *overrides]
    process = FRESH.Process(target=run_command, args=(words, run.with_suffix(".log")))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{run} ended with exit code {process.exitcode}: see {run.with_suffix('.log')}")


def run_command(words: list[str], log: Path) -> None:
    from parallel_clip.cli import main as command  # noqa: PLC0415  (here it is loaded already)

    torch.set_num_threads(1)
    with log.open("w") as file, redirect_stdout(file):
        code = command(words)
    sys.exit(code)


def load(run: Path, step: int) -> nn.Module:
    """OpenCLIP's model with the weights after `step`."""
    source = open_source(run / f"checkpoints/step_{step:08d}", verify=False)
    weights = {name: source.read(name) for name in source.shapes()}
    model = open_clip.CLIP(**MODEL, init_logit_bias=0.0 if "logit_bias" in weights else None)
    model.load_state_dict(weights)
    return model


def read_pairs(shards: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Pictures, and the tokens of their captions [pictures, captions, length], by OpenCLIP."""
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    images, tokens = [], []
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        images.append(transform(Image.open(io.BytesIO(sample["webp"])).convert("RGB")))
        tokens.append(tokenizer(sample["txt"].decode().split("\n")))
    return torch.stack(images), torch.stack(tokens)


@torch.no_grad()
def look_at(model: nn.Module) -> dict[str, float]:
    """Recall@1 of unseen concepts, the mean of both directions, by the third caption of each
    picture; mean cosines of pairs, and of two pictures, two texts, and both that are no pair."""
    model.eval()
    images, tokens = read_pairs(f"{DATA}/test-{{0000..0001}}.tar", model)
    pictures = model.encode_image(images, normalize=True)
    texts = model.encode_text(tokens[:, 2], normalize=True)
    cosines, others = pictures @ texts.t(), ~torch.eye(len(texts), dtype=torch.bool)
    right = torch.arange(len(texts))
    hits = [(cosines.argmax(dim) == right).float().mean() for dim in (0, 1)]
    return {
        "recall@1": sum(hits).item() / 2,
        "pairs": cosines.diagonal().mean().item(),
        "no pairs": cosines[others].mean().item(),
        "two pictures": (pictures @ pictures.t())[others].mean().item(),
        "two texts": (texts @ texts.t())[others].mean().item(),
    }


def open_clip_alone(before: nn.Module, steps: list[int]) -> list[dict[str, Any]]:
    """OpenCLIP's model and loss with the bias of 0 that it gives to weights without one, trained on
    whole pictures in an order of its own."""
    model = copy.deepcopy(before)
    model.logit_bias = nn.Parameter(torch.zeros(()))
    images, tokens = read_pairs(f"{DATA}/train-{{0000..0007}}.tar", model)
    loss = open_clip.loss.SigLipLoss()
    spared = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    generator, losses, seen = torch.Generator().manual_seed(0), [], []
    for step in range(1, max(steps) + 1):
        model.train()
        chosen = torch.randperm(len(images), generator=generator)[:BATCH]
        caption = torch.randint(tokens.shape[1], (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARMUP)
        optimizer.zero_grad()
        value = loss(*model(images[chosen], tokens[chosen, caption]))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(value.item())
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step in steps:
            seen.append({"step": step, **look_at(model)})
    seen[0] |= {"loss": losses[0], "logit_scale": 100.0, "logit_bias": 0.0}
    return seen


def print_table(results: dict[str, Any]) -> None:
    cases, source = results["cases"], results["source"]
    steps = [each["step"] for each in next(iter(cases.values()))]
    cosine = f"a mean cosine of two pictures of {source['two pictures']:.2f}"
    table = Table(title=f"After InfoNCE: recall@1 {source['recall@1']:.1%}, {cosine}")
    table.add_column("start")
    at = f"after {', '.join(map(str, steps))} steps"
    for column in ("bias", "loss at step 1", f"recall@1 {at}, %", f"cosine of two pictures {at}"):
        table.add_column(column, justify="right")
    for name, seen in cases.items():
        bias = seen[0]["logit_bias"]
        table.add_row(
            name,
            "-" if bias is None else f"{bias:.1f}",
            f"{seen[0]['loss']:,.2f}",
            "  ".join(f"{100 * each['recall@1']:4.1f}" for each in seen),
            "  ".join(f"{each['two pictures']:.2f}" for each in seen),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(describe(results["environment"]), style="dim", highlight=False)


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {
        "recall@1": "recall@1, concepts never seen",
        "two pictures": "mean cosine of two pictures",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, seen in results["cases"].items():
            values = [results["source"][key], *(each[key] for each in seen)]
            style = "--" if name == OPEN_CLIP else "-"
            axes.plot([0, *(each["step"] for each in seen)], values, style, marker="o", label=name)
        axes.set(title=title, xlabel="step")
    axes.legend(fontsize=8)
    figure.supxlabel(describe(results["environment"]), fontsize=6, color="grey")
    return figure


if __name__ == "__main__":
    main()
