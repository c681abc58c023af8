"""How many microbatches' activations the memory has room for: `parallel.stash: auto`."""

from __future__ import annotations

from dataclasses import replace

from parallel_clip.config import bytes_in
from parallel_clip.errors import InputError
from parallel_clip.loss.exchange import most_bytes, plan_exchange
from parallel_clip.pipeline.orders import microbatch_group_size
from parallel_clip.plan.dry_run import RankBytes
from parallel_clip.plan.stages import held_by, peak_activations
from parallel_clip.training.job import Job


def with_room(job: Job) -> Job:
    """The job with as many stashed microbatches as `parallel.memory` has room for on its fullest
    stage; unchanged where the config asks for no such count. Takes seconds a stage, and a process
    that is alone so far.

    Raises:
        InputError: not even two-pass has room.
    """
    parallel = job.config.parallel
    if parallel.memory is None:
        return job
    rooms = [_room(job, rank, bytes_in(parallel.memory)) for rank in range(job.layout.pipeline)]
    return replace(job, stash=min(rooms))


def _room(job: Job, pipeline_rank: int, memory: int) -> int:
    """The largest stash with which this rank stays within `memory` bytes."""
    held = held_by(job, pipeline_rank)
    free = memory - held.state
    if pipeline_rank == job.layout.pipeline - 1:
        free -= _loss_bytes(job)
    for stash in _candidates(job):
        if peak_activations(job, pipeline_rank, stash, held) <= free:
            return stash
    raise _too_little(job, pipeline_rank, memory, held)


def _candidates(job: Job) -> list[int]:
    """From all microbatches to none. With virtual stages those that run again are whole groups: a
    group in part would stall the others (see timeline.py)."""
    microbatches, layout = job.plan.microbatches, job.layout
    group = 1
    if layout.virtual_pipeline > 1:
        group = microbatch_group_size(microbatches, layout.pipeline)
    return sorted({0, *range(microbatches, 0, -group)}, reverse=True)


def _loss_bytes(job: Job) -> int:
    """What the loss holds on the last stage, where no other stage helps it."""
    settings, layout = job.config.loss, job.layout
    sizes = job.plan.per_rank, job.architecture.embed_dim, layout.data, layout.tensor
    return most_bytes(plan_exchange(settings.exchange, settings.tile, *sizes), *sizes)


def _too_little(job: Job, pipeline_rank: int, memory: int, held: RankBytes) -> InputError:
    least = held.state + peak_activations(job, pipeline_rank, 0, held)
    if pipeline_rank == job.layout.pipeline - 1:
        least += _loss_bytes(job)
    return InputError(
        f"parallel.memory {job.config.parallel.memory} is too little for stage {pipeline_rank}, "
        f"which fills {least / 1e9:.2f} GB with nothing stashed; lower batch.micro "
        f"{job.plan.micro_batch}, set recompute to selective or full, or use more parallel.tensor "
        "or parallel.pipeline ranks"
    )
