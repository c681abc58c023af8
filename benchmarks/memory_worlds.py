"""The part of memory_scaling.py that goes from 1 to 1,024 GPUs, ours beside OpenCLIP's.

Two questions: what a GPU holds with the same microbatch and one of it a step, so that the global
batch grows with the GPUs; and with the same global batch in microbatches of that size, for which
OpenCLIP has `--accum-freq` and this trainer two passes. They are the same thing: features first,
without graphs, then each microbatch again with the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from memory_counts import KINDS, Counts, Held
from memory_openclip import NODE, Forward, count_openclip
from rich.console import Console
from rich.table import Table

from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout, check_model
from parallel_clip.plan.memory import peak_memory

WORLDS = [2**n for n in range(11)]
BATCH = 32_768
PIPELINE = 8
QUESTIONS = SAME_MICROBATCH, SAME_BATCH = "same microbatch", f"global batch {BATCH:,}"
GB = 1e9


@dataclass(frozen=True)
class WorldRow:
    """What a GPU holds: recompute is none or full, OpenCLIP's `--grad-checkpointing`."""

    model: str
    question: str
    who: str
    recompute: str
    gpus: int
    held: Held

    @property
    def name(self) -> str:
        return self.who + ", recompute" * (self.recompute == "full")

    def as_dict(self) -> dict[str, Any]:
        names = ("model", "question", "who", "recompute", "gpus")
        return {name: getattr(self, name) for name in names} | self.held.as_dict()


def measure_worlds(counts: Counts, worlds: Sequence[int] = WORLDS) -> Iterator[WorldRow]:
    """Rows by question, trainer, recomputation and GPUs; none where a layout needs more GPUs."""
    opens = OpenClip(counts, worlds)
    for question in QUESTIONS:
        for recompute in ("none", "full"):
            for who, hold in _subjects(counts, opens, recompute, question):
                for gpus in worlds:
                    held = hold(gpus)
                    if held is not None:
                        yield WorldRow(
                            counts.architecture.name, question, who, recompute, gpus, held
                        )


def _subjects(counts: Counts, opens: OpenClip, recompute: str, question: str) -> Iterator[tuple]:
    """Names, and functions from GPUs to what one of them holds."""
    tensor = largest_tensor_size(counts)
    of_ours = partial(_ours, counts, recompute, question)
    yield "ours, data", lambda gpus: of_ours(gpus, 1, 1, False)
    yield "ours, data, ZeRO-1", lambda gpus: of_ours(gpus, 1, 1, True)
    yield f"ours, tensor {tensor}, ZeRO-1", lambda gpus: of_ours(gpus, tensor, 1, True)
    if question == SAME_BATCH:  # a pipeline needs several microbatches
        name = f"ours, tensor {tensor} x pipeline {PIPELINE}"
        yield name, lambda gpus: of_ours(gpus, tensor, PIPELINE, True)
    again = recompute == "full"
    yield "OpenCLIP, DDP", lambda gpus: opens.ddp(gpus, again, question)
    yield "OpenCLIP, FSDP2", lambda gpus: opens.fsdp2(gpus, again, question)


def largest_tensor_size(counts: Counts) -> int:
    """Of those that a node has room for and that divide the model."""
    for size in (8, 4, 2):
        try:
            check_model(size, counts.architecture.costs)
        except InputError:
            continue
        return size
    return 1


def _ours(
    counts: Counts, recompute: str, question: str, gpus: int, tensor: int, pipeline: int, zero: bool
) -> Held | None:
    """The fullest stage. Its kinds are added up, as the trainer does."""
    if gpus % (tensor * pipeline):
        return None
    layout = Layout(gpus, tensor, pipeline, sequence=tensor > 1)
    plan = counts.plan(layout, recompute, BATCH if question == SAME_BATCH else None)
    texts = 8 * counts.architecture.text.context_length * plan.batch.per_rank
    stages = []
    for number in range(pipeline):
        held = counts.held(layout, recompute, number, zero)
        peak = peak_memory(plan, number, plan.stash, held)
        loss = plan.peak_loss_bytes(tensor) if number == pipeline - 1 else 0
        kinds = (
            held.weights, 0, held.gradients, held.optimizer, 0, peak.activations, loss,
            peak.pictures + texts,
        )  # fmt: skip
        stages.append(Held(*kinds, at_once=sum(kinds)))
    return max(stages, key=lambda held: held.total)


class OpenClip:
    """OpenCLIP's model in training: counted once, in a process of its own, and then by arithmetic
    for each number of GPUs."""

    def __init__(self, counts: Counts, worlds: Sequence[int]):
        architecture, self._pairs = counts.architecture, counts.pairs
        losses = {
            (self._local_batch(question, gpus), gpus) for question in QUESTIONS for gpus in worlds
        }
        self.counted = call_without_gpus(
            count_openclip, architecture.name, counts.pairs, list(worlds), sorted(losses)
        )
        picture = 4 * 3 * prod(architecture.vision.image_size)  # in fp32
        self._input_bytes = picture + 8 * architecture.text.context_length
        self._width = architecture.embed_dim

    def ddp(self, gpus: int, checkpointing: bool, question: str) -> Held:
        """On one GPU OpenCLIP does not wrap the model."""
        counted = self.counted
        # Autocast keeps its copies until the loss is computed, whether backward needs them or not.
        copies = counted.ddp[False].constant
        buckets = counted.buckets if gpus > 1 else 0
        forward = counted.ddp[checkpointing]
        return self._held(question, gpus, 4 * counted.numbers, copies, buckets, forward, copies)

    def fsdp2(self, gpus: int, checkpointing: bool, question: str) -> Held | None:
        if gpus == 1:
            return None
        counted = self.counted
        step, forward = counted.steps[checkpointing], counted.fsdp2[checkpointing]
        weights = 4 * counted.sharded_numbers[gpus]
        return self._held(question, gpus, weights, step.gathered, step.on_the_way, forward, 0)

    def _held(
        self, question: str, gpus: int, weights: int, copies: int, buffers: int, forward: Forward,
        copies_of_forward: int,
    ) -> Held:  # fmt: skip
        """weights: fp32 of a GPU, whose gradients and moments are as many; copies_of_forward: those
        that go with what forward has kept."""
        pairs = self._local_batch(question, gpus)
        activations, loss = forward.of_a_pair * self._pairs, self.counted.loss[pairs, gpus]
        if pairs > self._pairs:
            loss += 2 * 4 * pairs * self._width  # the features that `--accum-freq` keeps
        kinds = (
            weights, copies, weights, 2 * weights, buffers, activations, loss,
            pairs * self._input_bytes,
        )  # fmt: skip
        at_once = sum(kinds)
        if pairs == self._pairs:
            # `optimizer.zero_grad` frees gradients: they come while what forward kept goes.
            at_once -= min(weights, copies_of_forward + activations + loss)
        return Held(*kinds, at_once=at_once)

    def _local_batch(self, question: str, gpus: int) -> int:
        """Pairs of a GPU in a step."""
        return BATCH // gpus if question == SAME_BATCH else self._pairs


# ------------------------------------------------------------------------------------ reporting


def print_worlds(console: Console, name: str, rows: Sequence[WorldRow]) -> None:
    worlds = sorted({row.gpus for row in rows})
    for question in QUESTIONS:
        table = Table(title=f"{name}: GB at once on a GPU, {question}", title_justify="left")
        table.add_column("GPUs")
        for gpus in worlds:
            table.add_column(f"{gpus:,}", justify="right")
        for of_name in _by_name(rows, question).values():
            found = {row.gpus: f"{row.held.at_once / GB:.2f}" for row in of_name}
            table.add_row(of_name[0].name, *(found.get(gpus, "-") for gpus in worlds))
        console.print(table)
    if NODE not in worlds:
        return
    table = Table(title=f"{name}: GB by kind on {NODE} GPUs", title_justify="left")
    table.add_column("")
    for column in (*KINDS, "at once"):
        table.add_column(column, justify="right")
    for question in QUESTIONS:
        table.add_row(question, style="bold")
        for row in rows:
            if (row.gpus, row.question) == (NODE, question):
                sizes = [getattr(row.held, kind) for kind in KINDS] + [row.held.at_once]
                table.add_row(row.name, *(f"{size / GB:.2f}" for size in sizes))
    console.print(table)


def draw_worlds(rows: Sequence[WorldRow], pairs: int, machine: str) -> Figure:
    """A panel for each model and question: bytes of a GPU by the number of GPUs."""
    names = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(13, 3.1 * len(names)))
    panels = figure.subplots(len(names), 2, squeeze=False)
    for of_model, name in zip(panels, names, strict=True):
        of_name = [row for row in rows if row.model == name]
        trainers = dict.fromkeys(row.who for row in of_name if row.question == SAME_BATCH)
        colors = {who: f"C{number}" for number, who in enumerate(trainers)}
        for axes, question in zip(of_model, QUESTIONS, strict=True):
            _draw_lines(axes, _by_name(of_name, question), colors)
            words = f"{pairs} pairs a data rank" if question == SAME_MICROBATCH else "accumulated"
            axes.set_title(f"{name}, {question} ({words})", fontsize=9)
    panels[0][1].legend(fontsize=6, ncols=2)
    for axes in panels[-1]:
        axes.set_xlabel("GPUs")
    words = f"counted, not measured; dashed: with recomputation. {machine}"
    figure.text(0.01, 0.004, words, fontsize=6, color="grey")
    figure.tight_layout(rect=(0, 0.01, 1, 1))
    return figure


def _draw_lines(axes: Axes, by_name: dict[str, list[WorldRow]], colors: dict[str, str]) -> None:
    for name, rows in by_name.items():
        style = "--" if rows[0].recompute == "full" else "-"
        sizes = [row.held.at_once / GB for row in rows]
        color = colors[rows[0].who]
        axes.plot([row.gpus for row in rows], sizes, style, color=color, label=name, linewidth=1.2)
    axes.axhline(80, color="grey", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(WORLDS, [str(gpus) for gpus in WORLDS], fontsize=7)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("GB a GPU (line: 80)", fontsize=8)


def _by_name(rows: Sequence[WorldRow], question: str) -> dict[str, list[WorldRow]]:
    found: dict[str, list[WorldRow]] = {}
    for row in rows:
        if row.question == question:
            found.setdefault(row.name, []).append(row)
    return found
