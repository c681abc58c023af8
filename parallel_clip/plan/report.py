"""`train --dry-run`: the layout in words, and what each stage of it holds and does."""

from __future__ import annotations

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parallel_clip.config import Config
from parallel_clip.plan.describe import describe_data, describe_reading, describe_run
from parallel_clip.plan.describe_segments import estimate_segment, peak_bytes
from parallel_clip.plan.layout_plan import stash_is_open
from parallel_clip.plan.memory_limit import PART_TO_FILL, Machine, ranks_on_machine
from parallel_clip.plan.run_plan import RunPlan, make_run_plan
from parallel_clip.plan.stage_estimate import StageEstimate
from parallel_clip.stages.stage import LayerRange

_GIB = 2**30


def dry_run_report(config: Config, world_size: int | None = None) -> str:
    """Find the errors that a run on `world_size` processes would find, and say what it would be.

    world_size: None: one process, on this machine; processes whose number is given may be meant for
    other machines, so that this one's memory refuses nothing. Writes nothing, touches no GPU.
    Raises InputError.
    """
    is_here, world_size = world_size is None, world_size or 1
    machine = Machine(ranks_on_machine(world_size), is_here, asks_gpu=False)
    plan, _ = make_run_plan(config, world_size, dry_run=True, machine=machine)
    steps = [estimate_segment(each) for each in plan.segments]
    step = max(steps, key=peak_bytes)
    segment = plan.segments[steps.index(step)].segment
    lines = [
        describe_run(plan),
        describe_data(plan),
        *describe_reading(plan, machine.ranks),
    ]
    if len(steps) > 1:
        lines.append(f"  below: steps {segment.first + 1:,} to {segment.stop:,}, the fullest")
    if plan.layout.pipeline > 1:
        lines += [
            _stage_table(plan, step.stages),
            "    parameters of a rank; TFLOP: its forward work on a microbatch; time: by FLOPs,",
            "    beside the slowest stage; GiB: all below, at the fullest. Bubble: ranks wait",
            f"    {step.bubble:.1%} of a step, unevenness included, messages and the loss left out",
        ]
    lines += _memory_lines(step.stages)
    some_run_twice = any(
        each.layout_plan.stash < each.layout_plan.batch.microbatches for each in plan.segments
    )
    if stash_is_open(config.parallel) and config.parallel.memory is None and some_run_twice:
        lines.append(
            f"    on GPUs a run keeps as many graphs as fit into {PART_TO_FILL:.0%} of what is "
            "free when it starts;\n    parallel.memory=70GB shows what that would be here"
        )
    return "\n".join(lines)


def _stage_table(plan: RunPlan, estimates: list[StageEstimate]) -> str:
    """Layers, parameters, work and memory of each pipeline rank."""
    slowest = max(estimate.work for estimate in estimates)
    pairs, tensor = plan.batch.micro_batch, plan.layout.tensor
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "vision layers", "text layers"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "TFLOP", "time", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for rank, estimate in enumerate(estimates):
        table.add_row(
            str(rank),
            ", ".join(_layers(stage.vision) for stage in estimate.chunks),
            ", ".join(_layers(stage.text) for stage in estimate.chunks),
            f"{estimate.held.parameters / 1e6:.2f} M",
            f"{pairs * estimate.flops / tensor / 1e12:.3f}",
            f"{estimate.work / slowest:.1%}",
            f"{estimate.peak / _GIB:.2f}",
        )
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())


def _layers(layer_range: LayerRange) -> str:
    """'8 (0-7)', or a dash."""
    if not layer_range.layers:
        return "-"
    return f"{layer_range.layers} ({layer_range.first}-{layer_range.stop - 1})"


def _memory_lines(estimates: list[StageEstimate]) -> list[str]:
    fullest = max(estimates, key=lambda estimate: estimate.peak)
    held = fullest.held
    kept = fullest.peak_activations / held.saved if held.saved else 0
    rows = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        **({"averages of the weights": held.averages} if held.averages else {}),
        f"saved activations of {kept:.3g} microbatch{'es' * (kept != 1)}": fullest.peak_activations,
    }
    if fullest.peak_pictures:
        count = fullest.peak_pictures // held.pictures
        rows[f"pictures of {count} microbatch{'es' * (count != 1)}"] = fullest.peak_pictures
    where = f" of stage {estimates.index(fullest)}, the fullest," if len(estimates) > 1 else ""
    lines = [f"  a rank{where} holds {held.parameters / 1e6:.2f} million parameters, in memory:"]
    lines += [f"    {name:42} {size / _GIB:8.3f} GiB" for name, size in rows.items()]
    lines.append(f"    {'together':42} {sum(rows.values()) / _GIB:8.3f} GiB")
    lines.append(
        "    besides: temporary buffers, the loss over the global batch, and the framework"
    )
    return lines
