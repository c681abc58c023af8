"""The arithmetic of a layout: stages, batches, stash. No torch, no files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel_clip.errors import InputError
from parallel_clip.stages.partition import partition
from parallel_clip.stages.stage import Stage

if TYPE_CHECKING:
    from parallel_clip.config import Config, Parallel
    from parallel_clip.layout import Layout
    from parallel_clip.model.architecture import Architecture


def stages_of(config: Config, architecture: Architecture, layout: Layout) -> tuple[Stage, ...]:
    """The layers of each stage, in the order in which data pass through them."""
    return partition(architecture, layout.pipeline, layout.virtual_pipeline, config.parallel.stages)


def choose_stash(parallel: Parallel, microbatches: int) -> int:
    """The number of microbatches, between 0 (two-pass) and all of them (stash).

    `auto` keeps all graphs if a step has no more microbatches than the pipeline has stages, as the
    first stage of 1F1B holds that many anyway, and otherwise none. Where `parallel.memory` is
    given, plan/stash.py counts how many there is room for.

    Raises:
        InputError: `parallel.stash` is more than there are microbatches, or contradicts
            `parallel.schedule`.
    """
    asked = parallel.stash
    _check(parallel, microbatches)
    if parallel.schedule == "two-pass":
        return 0
    if parallel.schedule == "stash":
        return microbatches
    if asked != "auto":
        return asked
    return microbatches if microbatches <= parallel.pipeline else 0


def _check(parallel: Parallel, microbatches: int) -> None:
    schedule, asked = parallel.schedule, parallel.stash
    if asked == "auto":
        return
    if schedule != "auto":
        meant = 0 if schedule == "two-pass" else microbatches
        if asked != meant:
            raise InputError(
                f"parallel.schedule {schedule} keeps the graphs of {meant} microbatches, and "
                f"parallel.stash is {asked}; set parallel.schedule to auto, or leave "
                "parallel.stash out"
            )
    if asked > microbatches:
        raise InputError(
            f"parallel.stash {asked} is more than the {microbatches} microbatches of a step; set "
            f"it to {microbatches} or fewer, or to auto"
        )
