"""The answer of `parallel-clip plan` for people: tables, words, and the lines to copy."""

from __future__ import annotations

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parallel_clip.plan.planner import Answer
from parallel_clip.plan.rank_bytes import RankBytes
from parallel_clip.plan.search import PlannedLayout
from parallel_clip.plan.step_peak import StepPeak

_SHOWN = 6
_GB = 1e9


def shown_layouts(answer: Answer, count: int = _SHOWN) -> list[PlannedLayout]:
    """The quickest of each tensor, pipeline and virtual pipeline size."""
    best: dict[tuple, PlannedLayout] = {}
    for found in answer.result.layouts:
        layout = found.plan.layout
        best.setdefault((layout.tensor, layout.pipeline, layout.virtual_pipeline), found)
    return list(best.values())[:count]


def answer_words(answer: Answer) -> str:
    """Several lines."""
    question, shown = answer.question, shown_layouts(answer)
    lines = [
        f"{answer.architecture.name}, batch {question.config.batch.global_:,}, on "
        f"{question.gpus:,} x {answer.device.name} with {answer.limit / _GB:.1f} GB each, "
        f"{question.nodes_of} in a node",
        *(f"  {note}" for note in answer.notes),
    ]
    if not shown:
        return "\n".join([*lines, f"  {nothing_fits(answer)}"])
    tried = len(answer.result.layouts)
    lines += [
        *_table(_layout_table(shown)),
        *_table(_time_table(answer, shown)),
        *_table(_memory_table(shown)),
        "    predicted, not measured; memory of the fullest stage, in GB (10^9 bytes).",
        "    docs/planning.md says what is counted and what is estimated",
    ]
    if answer.counted is not None:
        lines.append(f"    {_counted_words(answer.counted, shown[0].memory)}")
    if tried > 1:
        lines.append(
            f"    the best of each tensor, pipeline and virtual pipeline size, of {tried:,} "
            "layouts that fit"
        )
    lines += ["", *_comparison(shown), "", "To train so, in the config:", *yaml_lines(shown[0])]
    return "\n".join(lines)


def _counted_words(counted: StepPeak, predicted: RankBytes) -> str:
    estimated = predicted.total - predicted.tensors
    return (
        f"counted: a step of 1 on fake tensors holds {counted.total / _GB:.2f} GB of tensors in "
        f"its {counted.fullest_part}; predicted {predicted.tensors / _GB:.2f}, beside "
        f"{estimated / _GB:.2f} of estimates (process and slack)"
    )


def nothing_fits(answer: Answer) -> str:
    """What would do, where nothing does."""
    refused = [each for each in answer.result.refused if each.needs_bytes is not None]
    if not refused:
        return answer.result.refused[0].reason if answer.result.refused else "no layout divides"
    least = min(refused, key=lambda each: each.needs_bytes)
    parallel, count = least.config.parallel, answer.question.gpus
    return (
        f"no layout fits {answer.limit / _GB:.1f} GB on {count:,} GPU{'s' * (count > 1)}: the "
        f"least is {least.needs_bytes / _GB:.1f} GB, for tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline}, batch.micro {least.config.batch.micro}, recompute "
        f"{least.config.recompute}; give --gpu-memory {least.needs_bytes / _GB + 0.05:.1f}GB or "
        "more, more --gpus, or a smaller batch.global"
    )


def yaml_lines(found: PlannedLayout) -> list[str]:
    """The keys of a config that make it train in this layout."""
    parallel, batch = found.config.parallel, found.config.batch
    keys = {
        "tensor": parallel.tensor,
        "pad": parallel.pad,
        "sequence": parallel.sequence,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "schedule": parallel.schedule,
        "stash": parallel.stash,
        "distributed_optimizer": parallel.distributed_optimizer,
    }
    inner = ", ".join(f"{key}: {str(value).lower()}" for key, value in keys.items())
    stages = parallel.stages
    if stages is not None:
        inner += f", stages: {{vision: {stages.vision}, text: {stages.text}}}"
    return [
        f"parallel: {{{inner}}}",
        f"batch: {{global: {batch.global_}, micro: {batch.micro}}}",
        f"recompute: {found.config.recompute}",
    ]


# ----------------------------------------------------------------------------------------- tables


def _layout_table(shown: list[PlannedLayout]) -> Table:
    table = _new_table(
        "", "tensor", "pipeline", "virtual", "data", "micro", "microbatches", "graphs kept",
        "recompute", "texts of the loss", "padding",
    )  # fmt: skip
    for number, found in enumerate(shown, start=1):
        plan, layout = found.plan, found.plan.layout
        table.add_row(
            str(number),
            f"{layout.tensor}{' + sequence' * layout.sequence}",
            str(layout.pipeline),
            str(layout.virtual_pipeline),
            str(layout.data),
            str(plan.batch.micro_batch),
            str(plan.batch.microbatches),
            {plan.batch.microbatches: "all", 0: "none"}.get(plan.stash, str(plan.stash)),
            found.config.recompute,
            "gathered" if plan.exchange.gathered else "streamed",
            "yes" if found.config.parallel.pad else "-",
        )
    return table


def _time_table(answer: Answer, shown: list[PlannedLayout]) -> Table:
    table = _new_table(
        "", "step", "samples/s", "of each GPU", "MFU", "bubble", "tensor", "pipeline", "data",
        "loss", "days",
    )  # fmt: skip
    for number, found in enumerate(shown, start=1):
        time, days = found.time, answer.days(found)
        exposed = time.communication
        table.add_row(
            str(number),
            f"{time.seconds:.3f} s",
            f"{time.samples_per_second:,.0f}",
            f"{time.samples_per_second / answer.question.gpus:,.1f}",
            f"{time.mfu:.1%}",
            f"{time.bubble:.1%}",
            *(
                f"{exposed.get(kind, 0) / time.seconds:.1%}"
                for kind in ("tensor", "pipeline", "data", "loss")
            ),
            "-" if days is None else f"{days:.1f}",
        )
    table.caption = "tensor, pipeline, data, loss: communication that nothing hides, of the step"
    table.caption_justify = "left"
    return table


def _memory_table(shown: list[PlannedLayout]) -> Table:
    kinds = (
        "weights", "gradients", "optimizer", "activations", "loss", "inputs", "work", "buffers",
        "process", "slack", "total",
    )  # fmt: skip
    table = _new_table("", "stage", *kinds)
    for number, found in enumerate(shown, start=1):
        sizes = (f"{getattr(found.memory, kind) / _GB:.2f}" for kind in kinds)
        table.add_row(str(number), str(found.stage), *sizes)
    return table


def _new_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _table(table: Table) -> list[str]:
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------ words


def _comparison(shown: list[PlannedLayout]) -> list[str]:
    """Why the first wins, and what the next ones lose."""
    first = shown[0]
    name = _name(first)
    words = f"1 ({name}) is the quickest"
    if len(shown) == 1:
        return [f"1 ({name}): {_parts(first)}."]
    words += f": {_parts(first)}."
    lines = [words]
    for number, other in enumerate(shown[1:4], start=2):
        slower = other.time.seconds / first.time.seconds - 1
        lines.append(
            f"{number} ({_name(other)}) takes {slower:.1%} longer: {_loses(first, other)}."
        )
    return lines


def _name(found: PlannedLayout) -> str:
    layout = found.plan.layout
    sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    return sizes + f", {layout.virtual_pipeline} virtual" * (layout.virtual_pipeline > 1)


def _parts(found: PlannedLayout) -> str:
    seconds = _seconds(found)
    listed = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {each:.3f} s" for name, each in listed if each >= 0.0005)


def _loses(first: PlannedLayout, other: PlannedLayout) -> str:
    """The parts of its step that are longer, the largest difference first."""
    before, after = _seconds(first), _seconds(other)
    differences = {name: after[name] - before[name] for name in after}
    longer = sorted(differences.items(), key=lambda part: -part[1])
    listed = [f"{name} +{each:.3f} s" for name, each in longer[:3] if each >= 0.0005]
    return ", ".join(listed) or "all parts a little"


def _seconds(found: PlannedLayout) -> dict[str, float]:
    time = found.time
    exposed = {f"{kind} communication": each for kind, each in time.communication.items()}
    return {
        "kernels": time.compute,
        "waiting for other stages": time.bubble * time.seconds,
        **exposed,
        "the update": time.optimizer,
        "the loss": time.loss,
    }
