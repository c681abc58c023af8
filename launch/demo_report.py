"""What the demo shows at its end: curves, pictures found, both models' features, and the figures.

    python launch/demo_report.py RUN --openclip FOLDER --data SHARDS

RUN is the run folder of configs/demo.yaml with `retrieval.json` and `zero_shot.json` of
`parallel-clip evaluate` in it; FOLDER is the run converted to OpenCLIP. Writes `curves.png`,
`contact_sheet.png` and the figures as `report.json` into RUN. Ends with exit code 1 when OpenCLIP's
features are not ours.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

try:
    import matplotlib
    import open_clip
    from matplotlib import pyplot
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed: pip install 'parallel_clip[demo]'")

from parallel_clip.data.samples.transforms import evaluation_transform
from parallel_clip.engine.launch import Launch
from parallel_clip.engine.quiet import silence_dependency_warnings
from parallel_clip.layout import Layout

matplotlib.use("Agg")

CAPTIONS, FOUND = 8, 6  # rows and columns of the contact sheet
SHOWN_CAPTION = 2  # of each picture: "animals & nature: mammals: koala in gray and pink, 3D"
FEATURE_TOLERANCE = 1e-4  # largest difference between coordinates of two features of length 1
ENCODE_BATCH = 100
RIGHT_COLOR = "#2ca02c"


@dataclass(frozen=True)
class TestPicture:
    """A held-out picture with its captions, as it lies in the shards."""

    image: Image.Image
    captions: list[str]


def read_pictures(shards: str) -> list[TestPicture]:
    """All pictures of `shards` (a brace pattern), in their order."""
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [
        TestPicture(
            Image.open(io.BytesIO(sample["webp"])).convert("RGB"),
            sample["txt"].decode().split("\n"),
        )
        for sample in dataset
    ]


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_seconds(metrics: list[dict]) -> float:
    """How long all steps of a run took, from the lines of its metrics.jsonl."""
    before = [0, *(line["step"] for line in metrics)]
    return sum(
        line["step_seconds"] * (line["step"] - earlier)
        for line, earlier in zip(metrics, before, strict=False)
    )


@torch.no_grad()
def openclip_features(
    folder: Path, pictures: list[TestPicture], captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Features [pictures, D] and [captions, D] of length 1, all of it by OpenCLIP.

    Its model, its preprocessing and its tokenizer, from nothing but the converted folder.
    """
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    images = torch.stack([preprocess(picture.image) for picture in pictures])
    return (
        in_batches(lambda batch: model.encode_image(batch, normalize=True), images),
        in_batches(lambda batch: model.encode_text(batch, normalize=True), tokenizer(captions)),
    )


@torch.no_grad()
def our_features(
    run: Path, pictures: list[TestPicture], captions: list[str]
) -> tuple[Tensor, Tensor]:
    """The same by parallel_clip from its own checkpoint, gathered into one process."""
    silence_dependency_warnings()
    from parallel_clip.engine.groups import join_world, make_groups  # they import megatron-core
    from parallel_clip.evaluate.encoder import load_encoder

    join_world(Launch(0, 0, 1))
    encoder = load_encoder(str(run), make_groups(Layout(1)))
    transform = evaluation_transform(encoder.preprocess)
    images = torch.stack([transform(picture.image) for picture in pictures])
    return (
        in_batches(lambda batch: encoder.encode_image(batch.to(encoder.device)).cpu(), images),
        in_batches(
            lambda batch: encoder.encode_text(batch.to(encoder.device)).cpu(),
            encoder.tokenizer(captions),
        ),
    )


def in_batches(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([encode(batch) for batch in inputs.split(ENCODE_BATCH)])


def draw_curves(metrics: list[dict], evaluations: list[dict], chance: float, path: Path) -> None:
    """Loss, learning rate and recall on unseen concepts, over the steps."""
    figure, (loss, rate, recall) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    steps = [line["step"] for line in metrics]
    loss.plot(steps, [line["loss"] for line in metrics])
    loss.set(title="contrastive loss", xlabel="step")
    rate.plot(steps, [line["lr"] for line in metrics])
    rate.set(title="learning rate", xlabel="step")
    for direction in ("image_to_text", "text_to_image"):
        points = [
            (line["step"], line["retrieval"][f"{direction}_recall@1"]) for line in evaluations
        ]
        recall.plot(*zip(*points, strict=True), marker="o", label=direction.replace("_", " "))
    recall.axhline(chance, color="gray", linestyle=":", label="chance")
    recall.axhline(10 * chance, color="gray", linestyle="--", label="10 × chance")
    recall.set(title="recall@1, concepts never seen", xlabel="step", ylim=(0, None))
    recall.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_contact_sheet(
    pictures: list[TestPicture], image_features: Tensor, text_features: Tensor, path: Path
) -> None:
    """For some captions the pictures found, the nearest first, the caption's own in a frame.

    image_features [N, D]; text_features [N, D], one caption a picture. The captions are taken at
    equal distances through the test pictures, not chosen; every other one is of the other style.
    """
    figure, axes = pyplot.subplots(
        CAPTIONS, FOUND + 1, figsize=(12, 1.25 * CAPTIONS), layout="constrained",
        width_ratios=[4.5, *[1] * FOUND],
    )  # fmt: skip
    for row in range(CAPTIONS):
        own = row * len(pictures) // CAPTIONS + row % 2
        found = (image_features @ text_features[own]).argsort(descending=True)
        place = found.tolist().index(own) + 1
        caption = pictures[own].captions[SHOWN_CAPTION]
        axes[row, 0].text(0, 0.5, f"{caption}\nits own picture: rank {place} of {len(found)}",
                          va="center", wrap=True)  # fmt: skip
        axes[row, 0].axis("off")
        for cell, index in zip(axes[row, 1:], found[:FOUND].tolist(), strict=True):
            cell.imshow(pictures[index].image)
            cell.set(xticks=[], yticks=[])
            for side in cell.spines.values():
                side.set(visible=index == own, color=RIGHT_COLOR, linewidth=4)
    figure.suptitle("Captions of concepts never seen in training, and the pictures found for them")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def read_figures(run: Path, difference: float, chance: float) -> dict[str, Any]:
    """What the demo shows, as JSON has it: lengths, speed, fractions from 0 to 1."""
    metrics = read_lines(run / "metrics.jsonl")
    last, seconds = metrics[-1], training_seconds(metrics)
    retrieval, zero_shot = (
        json.loads((run / f"{name}.json").read_text()) for name in ("retrieval", "zero_shot")
    )
    return {
        "steps": last["step"],
        "pairs": last["samples_seen"],
        "training_seconds": seconds,
        "pairs_per_second": last["samples_seen"] / seconds,
        "loss": last["loss"],
        "retrieval": retrieval,
        "retrieval_chance": chance,
        "zero_shot": zero_shot,
        "zero_shot_chance": 1 / zero_shot["classes"],
        "largest_feature_difference": difference,
    }


def summarize(figures: dict[str, Any], run: Path, openclip: Path) -> Table:
    """The figures and where things are, as a table of two columns."""
    retrieval, zero_shot = figures["retrieval"], figures["zero_shot"]
    chance, top1_chance = figures["retrieval_chance"], figures["zero_shot_chance"]
    table = Table(title="parallel_clip demo", show_header=False)
    table.add_row(
        "trained",
        f"{figures['steps']} steps, {figures['pairs']:,} pairs in "
        f"{figures['training_seconds'] / 60:.1f} minutes, loss {figures['loss']:.3f}",
    )
    for direction in ("image_to_text", "text_to_image"):
        at1, at5 = (retrieval[f"{direction}_recall@{k}"] for k in (1, 5))
        table.add_row(
            f"{direction.replace('_', ' ')}, concepts never seen",
            f"recall@1 {at1:.1%} ({at1 / chance:.0f} × chance), recall@5 {at5:.1%}",
        )
    table.add_row(
        f"zero-shot, {zero_shot['classes']} classes",
        f"top-1 {zero_shot['top1']:.1%} ({zero_shot['top1'] / top1_chance:.0f} × chance), "
        f"top-5 {zero_shot['top5']:.1%}",
    )
    difference = figures["largest_feature_difference"]
    table.add_row("features, OpenCLIP against ours", f"differ by at most {difference:.1e}")
    table.add_row("checkpoint", str(run / "checkpoints"))
    table.add_row("OpenCLIP checkpoint", str(openclip))
    table.add_row("curves", str(run / "curves.png"))
    table.add_row("contact sheet", str(run / "contact_sheet.png"))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--openclip", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", required=True, metavar="SHARDS")
    options = parser.parse_args()
    run = options.run

    pictures = read_pictures(options.data)
    captions = [picture.captions[SHOWN_CAPTION] for picture in pictures]
    theirs = openclip_features(options.openclip, pictures, captions)
    ours = our_features(run, pictures, captions)
    difference = max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))

    # Every caption belongs to one picture: drawn at random, one in N is the right one, both ways.
    chance = 1 / len(pictures)
    draw_curves(
        read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl"), chance,
        run / "curves.png",
    )  # fmt: skip
    draw_contact_sheet(pictures, *theirs, run / "contact_sheet.png")
    figures = read_figures(run, difference, chance)
    (run / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    Console().print(summarize(figures, run, options.openclip))
    if difference > FEATURE_TOLERANCE:
        print(f"the features differ by more than {FEATURE_TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
