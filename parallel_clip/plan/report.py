"""`train --dry-run`: the layout in words, and what each stage of it holds and does."""

from __future__ import annotations

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parallel_clip.config import Config
from parallel_clip.plan.describe import describe_job
from parallel_clip.plan.memory import fit_stash_to_memory
from parallel_clip.plan.run_plan import Job, check_data, make_run_plan
from parallel_clip.plan.stages import StageEstimate, stage_estimates
from parallel_clip.plan.step_time import step_timeline
from parallel_clip.stages.stage import LayerRange

_GIB = 2**30


def dry_run_report(config: Config, world_size: int) -> str:
    """Find the errors that a run on `world_size` processes would find, and say what it would be.

    Writes nothing. Raises InputError.
    """
    job = make_run_plan(config, world_size)
    steps, _ = check_data(job, print, counts_suffice=True)
    job = fit_stash_to_memory(job)
    loads = stage_estimates(job)
    lines = [describe_job(job, steps)]
    if job.layout.pipeline > 1:
        lines += [_stage_table(job, loads), _legend(job)]
    return "\n".join([*lines, *_memory_lines(job, loads)])


def _stage_table(job: Job, loads: list[StageEstimate]) -> str:
    """Layers, parameters, work and memory of each pipeline rank."""
    slowest, pairs = max(load.flops for load in loads), job.plan.micro_batch
    table = Table(box=SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "vision layers", "text layers"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "TFLOP", "time", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for rank, load in enumerate(loads):
        table.add_row(
            str(rank),
            ", ".join(_layers(stage.vision) for stage in load.chunks),
            ", ".join(_layers(stage.text) for stage in load.chunks),
            f"{load.held.parameters / 1e6:.2f} M",
            f"{pairs * load.flops / job.layout.tensor / 1e12:.3f}",
            f"{load.flops / slowest:.1%}",
            f"{load.peak / _GIB:.2f}",
        )
    console = Console(file=StringIO(), width=200)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())


def _legend(job: Job) -> str:
    bubble = step_timeline(job).bubble
    return (
        "    parameters of a rank; TFLOP: its forward work on a microbatch; time: by FLOPs,\n"
        "    beside the slowest stage; GiB: all below, at the fullest. Bubble: ranks wait\n"
        f"    {bubble:.1%} of a step, unevenness included, messages and the loss left out"
    )


def _layers(held: LayerRange) -> str:
    """'8 (0-7)', or a dash."""
    return f"{held.layers} ({held.first}-{held.stop - 1})" if held.layers else "-"


def _memory_lines(job: Job, loads: list[StageEstimate]) -> list[str]:
    fullest = max(loads, key=lambda load: load.peak)
    held = fullest.held
    kept = fullest.peak_activations / held.saved
    rows = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        f"saved activations of {kept:.3g} microbatch{'es' * (kept != 1)}": fullest.peak_activations,
    }
    where = f" of stage {loads.index(fullest)}, the fullest," if len(loads) > 1 else ""
    lines = [f"  a rank{where} holds {held.parameters / 1e6:.2f} million parameters, in memory:"]
    lines += [f"    {name:42} {size / _GIB:8.3f} GiB" for name, size in rows.items()]
    lines.append(f"    {'together':42} {sum(rows.values()) / _GIB:8.3f} GiB")
    lines.append(
        "    besides: temporary buffers, the loss over the global batch, and the framework"
    )
    return lines
