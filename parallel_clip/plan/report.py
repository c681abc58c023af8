"""`train --dry-run`: the layout in words, and what a rank of it holds in memory."""

from __future__ import annotations

from parallel_clip.config import Config
from parallel_clip.plan.dry_run import RankBytes, dry_run
from parallel_clip.training.describe import describe_job
from parallel_clip.training.job import check_data, make_job

_GIB = 2**30


def dry_run_report(config: Config, world_size: int) -> str:
    """Find the errors that a run on `world_size` processes would find, and say what it would be.

    Writes nothing. Raises InputError.
    """
    job = make_job(config, world_size)
    steps, _ = check_data(job, print)
    held = dry_run(config, job.architecture, job.layout)
    return "\n".join([describe_job(job, steps), *_memory_lines(held, job.plan, job.schedule)])


def _memory_lines(held: RankBytes, plan, schedule: str) -> list[str]:
    kept = plan.microbatches if schedule == "stash" else 1
    rows = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        f"saved activations of {kept} microbatch{'es' * (kept > 1)}": kept * held.saved,
    }
    lines = [f"  a rank holds {held.parameters / 1e6:.2f} million parameters, and in memory:"]
    lines += [f"    {name:42} {size / _GIB:8.3f} GiB" for name, size in rows.items()]
    lines.append(f"    {'together':42} {sum(rows.values()) / _GIB:8.3f} GiB")
    lines.append(
        "    besides: temporary buffers, the loss over the global batch, and the framework"
    )
    return lines
