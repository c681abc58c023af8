"""The segments of a run in words: what changes when, and what each of them takes."""

from __future__ import annotations

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parallel_clip.config import Blend, training_sources
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.plan.segment_plan import SegmentPlan
from parallel_clip.plan.stage_estimate import StepEstimate, estimate_step

_GIB = 2**30


def segment_table(plan: RunPlan) -> list[str]:
    """A line for each segment, below a head; nothing where there is one alone. With memory where
    it was counted."""
    if len(plan.segments) == 1:
        return []
    counted = all(each.memory is not None for each in plan.segments)
    blends = training_sources(plan.config).blends
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for column in ("phase", "steps", "pixels", "tokens", "lr", "frozen", "vision", "text"):
        table.add_column(column, no_wrap=True)
    if len(blends) > 1:
        table.add_column("sources", no_wrap=True)
    if counted:
        table.add_column("GiB", justify="right", no_wrap=True)
    for each in plan.segments:
        row = [str(each.segment.number), _steps(each), _pixels(each), _tokens(each)]
        row += [f"{each.segment.lr:g}", _frozen(each) or "-"]
        row += [_layers(each, "vision"), _layers(each, "text")]
        if len(blends) > 1:
            row.append(_sources(blends[each.segment.blend]))
        if counted:
            row.append(f"{peak_bytes(estimate_segment(each)) / _GIB:.2f}")
        table.add_row(*row)
    console = Console(file=StringIO(), width=200)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    return [
        *lines,
        "    lr: the highest; tokens of the image tower in training; layers on each stage"
        + ("; GiB: of the fullest" if counted else ""),
    ]


def segment_words(plan: SegmentPlan) -> str:
    """On one line."""
    words = f"{_pixels(plan)} pixels, {_tokens(plan)} tokens, highest learning rate"
    words += f" {plan.segment.lr:g}"
    return f"{words}, frozen: {frozen}" if (frozen := _frozen(plan)) else words


def estimate_segment(plan: SegmentPlan) -> StepEstimate:
    """A step of a segment whose memory was counted."""
    costs = plan.frozen.costs_of(plan.architecture)
    return estimate_step(plan.layout_plan, costs, plan.memory)


def peak_bytes(step: StepEstimate) -> int:
    """Of the fullest stage."""
    return max(stage.peak for stage in step.stages)


def _sources(weights: Blend) -> str:
    return ", ".join(str(number) for number, weight in enumerate(weights) if weight)


def _steps(plan: SegmentPlan) -> str:
    first, last = plan.segment.first + 1, plan.segment.stop
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _pixels(plan: SegmentPlan) -> str:
    return " x ".join(map(str, plan.architecture.vision.image_size))


def _tokens(plan: SegmentPlan) -> str:
    """'26 of 50', where patches are left out."""
    vision = plan.architecture.vision
    kept = vision.training_tokens
    return str(kept) if kept == vision.tokens else f"{kept} of {vision.tokens}"


def _frozen(plan: SegmentPlan) -> str:
    towers = {"vision": plan.frozen.vision, "text": plan.frozen.text}
    return ", ".join(
        name if tower.whole else f"a part of {name}"
        for name, tower in towers.items()
        if tower.names
    )


def _layers(plan: SegmentPlan, tower: str) -> str:
    return ", ".join(str(getattr(stage, tower).layers) for stage in plan.layout_plan.stages)
