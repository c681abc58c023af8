"""What fine-tuning gained and what it cost: before, after, and the means of both weights between.

    python launch/finetune_report.py FOLDER --demo RUN --tuned-on SHARDS --not-tuned-on SHARDS

FOLDER holds two runs of one model: `before`, the weights that fine-tuning began with, and `after`;
RUN is what both are from. Evaluates retrieval and zero-shot classification on both sets for RUN and
for (1 - share) · before + share · after at the shares 0, 1/8 ... 1, as WiSE-FT does (Wortsman et
al., arXiv 2109.01903). Writes the figures as `report.json` and the picture `mixes.png` into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from demo_report import read_lines, training_seconds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parallel_clip.data.feeding.evaluation_data import EvaluationData
from parallel_clip.data.index.shard_table import ShardTable, find_checked_shards, save_index
from parallel_clip.engine.launch import Launch
from parallel_clip.engine.quiet import silence_dependency_warnings
from parallel_clip.errors import InputError
from parallel_clip.evaluate.prompts import read_classes, read_templates
from parallel_clip.layout import Layout

DEMO_DATA = Path(__file__).parent / "demo_data"
SHARES = [Fraction(k, 8) for k in range(9)]
SETS = {"tuned_on": "small pictures", "not_tuned_on": "full-size pictures"}
TUNED = {"tuned_on": "tuned on", "not_tuned_on": "not tuned on"}
COLORS = {"tuned_on": "tab:orange", "not_tuned_on": "tab:blue"}

Figures = dict[str, Any]  # of one model: by set, what `evaluate retrieval` and `zero-shot` give


def recall(figures: Figures) -> float:
    """Recall@1 on one set, the mean of both directions."""
    retrieval = figures["retrieval"]
    directions = ("image_to_text", "text_to_image")
    return sum(retrieval[f"{direction}_recall@1"] for direction in directions) / 2


def top1(figures: Figures) -> float:
    """Zero-shot accuracy on one set."""
    return figures["zero_shot"]["top1"]


def best_mix(mixes: list[Figures]) -> Figures:
    """The one with the largest sum of recalls on both sets, the first of equal ones."""
    return max(mixes, key=lambda mix: sum(recall(mix[name]) for name in SETS))


# --------------------------------------------------------------------------------------- measuring


def evaluate_all(before: Path, after: Path, demo: Path, sets: Mapping[str, str]) -> Figures:
    """The figures of `demo`, and of each mix of `before` and `after`, on `sets`: shards by name.

    Raises:
        InputError: one is no checkpoint, they are of different models, or shards cannot be used.
    """
    silence_dependency_warnings()
    from parallel_clip.convert.open import convert_checkpoint  # these import megatron-core
    from parallel_clip.engine.groups import join_world, make_groups
    from parallel_clip.evaluate.encoder import load_encoder
    from parallel_clip.evaluate.held_out import ClassPrompts, HeldOutEvaluation

    tables: dict[str, ShardTable] = {}
    for name, shards in sets.items():
        tables[name] = find_checked_shards(shards, print)
        save_index(tables[name], print)
    prompts = ClassPrompts(
        read_classes(DEMO_DATA / "classes.txt"), read_templates(DEMO_DATA / "templates.txt")
    )
    join_world(Launch(0, 0, 1))
    groups = make_groups(Layout(1))

    def evaluate(checkpoint: Path) -> Figures:
        encoder = load_encoder(checkpoint, groups)
        figures = {}
        for name, table in tables.items():
            data = {
                what: EvaluationData(table, encoder.preprocess, encoder.tokenizer, need=need)
                for what, need in (("retrieval", "captions"), ("zero_shot", "labels"))
            }
            evaluation = HeldOutEvaluation(data, prompts, encoder, groups, "infonce", batch=64)
            figures[name] = evaluation.evaluate()
        return figures

    def evaluate_mix(share: Fraction) -> Figures:
        if share in (0, 1):
            return evaluate(after if share else before)
        with tempfile.TemporaryDirectory(dir=after.parent) as folder:
            convert_checkpoint(before, folder, "run", mix=[(after, str(share))])
            return evaluate(Path(folder))

    return {
        "demo": evaluate(demo),
        "mixes": [
            {"share": float(share), **evaluate_mix(share)}
            for share in track(SHARES, description="mixes")
        ],
    }


def describe_run(after: Path) -> Figures:
    """Steps of fine-tuning, and how long those took that its log is of."""
    status = json.loads((after / "status.json").read_text())
    seconds = training_seconds(read_lines(after / "metrics.jsonl"))
    return {"steps": status["step"], "training_seconds": seconds}


# ----------------------------------------------------------------------------------------- showing


def summarize(report: Figures) -> Table:
    """A row a model: what it is, and recall@1 and top-1 on both sets."""
    table = Table(
        title="Before and after fine-tuning, and between, on concepts never seen",
        caption="bold: the largest sum of both recalls",
    )
    table.add_column("weights", no_wrap=True)
    for name, words in SETS.items():
        table.add_column(f"{words}\n{TUNED[name]}\nrecall@1", justify="right", no_wrap=True)
        table.add_column("\nzero-shot\ntop-1", justify="right", no_wrap=True)
    table.add_row("the demo's run", *_cells(report["demo"]), end_section=True)
    best = best_mix(report["mixes"])
    for mix in report["mixes"]:
        style = "bold" if mix is best else None
        table.add_row(share_words(mix["share"]), *_cells(mix), style=style)
    return table


def _cells(figures: Figures) -> list[str]:
    return [f"{of(figures[name]):.1%}" for name in SETS for of in (recall, top1)]


def share_words(share: float) -> str:
    """The share of the fine-tuned weights in a mix."""
    return {0: "before", 1: "after"}.get(share, str(Fraction(share)))


def draw(report: Figures) -> Figure:
    """Recall and accuracy over the share of the tuned weights, and one set against the other."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    over_recall, over_top1, path = figure.subplots(1, 3)
    _draw_over_shares(over_recall, report, recall, 1 / _pictures(report))
    over_recall.set(title="recall@1, mean of both directions")
    _draw_over_shares(over_top1, report, top1, 1 / len(read_classes(DEMO_DATA / "classes.txt")))
    over_top1.set(title="zero-shot top-1, nine classes")
    _draw_path(path, report["mixes"])
    figure.suptitle("Weights between before and after fine-tuning, on concepts never seen")
    return figure


def _pictures(report: Figures) -> int:
    return report["demo"]["tuned_on"]["retrieval"]["images"]


def _draw_over_shares(
    axes: Axes, report: Figures, figure_of: Callable[[Figures], float], chance: float
) -> None:
    shares = [mix["share"] for mix in report["mixes"]]
    for name, words in SETS.items():
        values = [figure_of(mix[name]) for mix in report["mixes"]]
        label = f"{words} ({TUNED[name]})"
        axes.plot(shares, values, marker="o", color=COLORS[name], label=label)
    axes.axhline(chance, color="gray", linestyle=":", label="chance")
    axes.set_xticks(shares, [share_words(share) for share in shares])
    axes.set(xlabel="share of the fine-tuned weights", ylim=(0, None))
    axes.legend()


def _draw_path(axes: Axes, mixes: list[Figures]) -> None:
    """Each mix by its recall on both sets, beside a straight line between the ends."""
    points = [(recall(mix["not_tuned_on"]), recall(mix["tuned_on"])) for mix in mixes]
    ends = [points[0], points[-1]]
    axes.plot(*zip(*ends, strict=True), linestyle="--", color="gray")
    axes.plot(*zip(*points, strict=True), marker="o", color="black")
    for mix, point in zip(mixes, points, strict=True):
        words = share_words(mix["share"])
        above = 5 if mix["share"] else -12  # the first two are close together
        axes.annotate(words, point, xytext=(6, above), textcoords="offset points")
    axes.margins(0.2)
    axes.set(title="recall@1 on one against the other")
    axes.set(xlabel=f"{SETS['not_tuned_on']} (not tuned on)")
    axes.set(ylabel=f"{SETS['tuned_on']} (tuned on)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--demo", type=Path, required=True, metavar="RUN")
    parser.add_argument("--tuned-on", required=True, metavar="SHARDS")
    parser.add_argument("--not-tuned-on", required=True, metavar="SHARDS")
    options = parser.parse_args()
    before, after = options.folder / "before", options.folder / "after"
    sets = {name: getattr(options, name) for name in SETS}
    try:
        figures = evaluate_all(before, after, options.demo, sets)
    except InputError as error:
        print(f"finetune_report: {error}", file=sys.stderr)
        return 2
    report = {**describe_run(after), **figures}
    (options.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report).savefig(options.folder / "mixes.png", dpi=120)
    console = Console()
    console.print(summarize(report))
    minutes = report["training_seconds"] / 60
    console.print(f"fine-tuned {report['steps']} steps in {minutes:.1f} minutes: {after}")
    console.print(f"picture: {options.folder / 'mixes.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
