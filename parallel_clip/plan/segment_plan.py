"""The plan of each segment of a run: its model, partition, preprocessing and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from parallel_clip.config import Config, Freeze
from parallel_clip.convert.choose_model import resolve_preprocess
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.engine.device import free_memory_bytes
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import FrozenParts
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan, stash_depends_on_memory
from parallel_clip.plan.memory import (
    RankMemory,
    count_stages,
    fit_stash_to_memory,
    largest_stash,
)
from parallel_clip.plan.segments import Segment

# What is left is for what `count_stages` does not count: what kernels work in, gradients on their
# way, NCCL's buffers, gaps of the allocator.
PART_OF_FREE_MEMORY = 0.8

PreprocessSettings = Sequence[tuple[str, Mapping[str, Any] | None]]


@dataclass(frozen=True)
class SegmentPlan:
    """How the steps of a segment run: with which model, spread over the ranks how. memory: what
    each pipeline stage holds, None where it was not counted."""

    segment: Segment
    architecture: Architecture
    layout_plan: LayoutPlan
    preprocess: Preprocess
    memory: tuple[RankMemory, ...] | None

    @property
    def frozen(self) -> FrozenParts:
        return frozen_parts(self.architecture, self.segment.freeze)

    def trains(self, model: Architecture, freeze: Freeze) -> bool:
        """Whether it is `model` that is trained, but for what `freeze` says."""
        return (self.architecture, self.segment.freeze) == (model, freeze)


def plan_segments(
    config: Config,
    models: Sequence[Architecture],
    segments: Sequence[Segment],
    preprocess: PreprocessSettings,
    world_size: int,
    dry_run: bool,
) -> tuple[tuple[SegmentPlan, ...], list[str]]:
    """The plans of segments, and what there is to say of their memory. models: of each phase;
    preprocess: as in `resolve_preprocess`; memory is counted as `make_run_plan` says.

    Raises:
        InputError: the layout does not fit the model of a phase, or `parallel.memory` it.
    """
    plans: list[SegmentPlan] = []
    notes: list[str] = []
    for segment in segments:
        model, of_segment = models[segment.number], segment.config_of(config)
        if plans and plans[-1].trains(model, segment.freeze):
            plans.append(replace(plans[-1], segment=segment))
            continue
        with told_of_phase(config, segment.number):
            costs = frozen_parts(model, segment.freeze).costs_of(model)
            layout_plan = make_layout_plan(costs, world_size, config)
            layout_plan, memory, told = _fit_to_memory(of_segment, model, layout_plan, dry_run)
        seen_as, _ = resolve_preprocess(model.vision.image_size, preprocess)
        plans.append(SegmentPlan(segment, model, layout_plan, seen_as, memory))
        notes += told
    return tuple(plans), [*dict.fromkeys(notes)]


@contextmanager
def told_of_phase(config: Config, number: int) -> Iterator[None]:
    """An InputError inside says of which phase it is, where there are several."""
    try:
        yield
    except InputError as error:
        if len(config.phases) < 2:
            raise
        raise InputError(f"phases.{number}: {error}") from None


def _fit_to_memory(
    config: Config, architecture: Architecture, plan: LayoutPlan, dry_run: bool
) -> tuple[LayoutPlan, tuple[RankMemory, ...] | None, list[str]]:
    """The plan with the microbatches that keep their graphs, what the stages hold (None: it was not
    asked for) and what there is to say of it."""
    limit, free = config.parallel.memory, None
    if not dry_run and stash_depends_on_memory(config.parallel, plan):
        free = free_memory_bytes()
    if not dry_run and limit is None and free is None:
        return plan, None, []
    memory = count_stages(config, architecture, plan)
    if limit is not None:
        return fit_stash_to_memory(plan, memory, limit), memory, []
    if free is None:
        return plan, memory, []
    to_fill = int(PART_OF_FREE_MEMORY * free)
    note = (
        f"parallel.memory: {to_fill / 1e9:.1f} GB, of {free / 1e9:.1f} GB that are free on the GPU "
        "of rank 0"
    )
    return replace(plan, stash=largest_stash(plan, memory, to_fill) or 0), memory, [note]
