"""The plan of each segment of a run: its model, partition, preprocessing and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from parallel_clip.config import Config, Freeze
from parallel_clip.convert.choose_model import resolve_preprocess
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.frozen import FrozenParts
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.layout_plan import LayoutPlan, make_layout_plan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.memory_check import Shortage, shortage_words
from parallel_clip.plan.memory_limit import Machine
from parallel_clip.plan.memory_of_run import MemoryOfRun
from parallel_clip.plan.prediction import Prediction, memory_words
from parallel_clip.plan.segments import Segment

PreprocessSettings = Sequence[tuple[str, Mapping[str, Any] | None]]


@dataclass(frozen=True)
class SegmentPlan:
    """How the steps of a segment run: with which model, spread over the ranks how. memory: what
    each pipeline stage holds, and prediction: of a step; None where it was not counted."""

    segment: Segment
    architecture: Architecture
    layout_plan: LayoutPlan
    preprocess: Preprocess
    memory: tuple[RankMemory, ...] | None
    prediction: Prediction | None = None

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
    machine: Machine,
    dry_run: bool,
    done: int,
) -> tuple[tuple[SegmentPlan, ...], list[str]]:
    """The plans of segments, and what there is to say of their memory. models: of each phase;
    preprocess: as in `resolve_preprocess`; dry_run: memory is counted on whole stages; done: the
    steps that the run has done, of which no memory is asked.

    Raises:
        InputError: the layout does not fit the model of a phase, or into memory (`plan.check`).
    """
    plans: list[SegmentPlan] = []
    notes: list[str] = []
    memory = MemoryOfRun(config, world_size, machine, dry_run)
    for segment in segments:
        model, of_segment = models[segment.number], segment.config_of(config)
        if plans and plans[-1].trains(model, segment.freeze):
            plans.append(replace(plans[-1], segment=segment))
            continue
        with told_of_phase(config, segment.number):
            costs = frozen_parts(model, segment.freeze).costs_of(model)
            layout_plan = make_layout_plan(costs, world_size, config)
            found = memory.of(of_segment, model, layout_plan)
        seen_as, _ = resolve_preprocess(model.vision.image_size, preprocess)
        plans.append(SegmentPlan(segment, model, found.plan, seen_as, found.held, found.prediction))
        notes += found.notes
    to_come = [each for each in plans if each.segment.stop > done and each.prediction is not None]
    if to_come:
        fullest = max(to_come, key=lambda each: each.prediction.memory.total)
        with told_of_phase(config, fullest.segment.number):
            notes += _check(config, fullest, to_come, memory)
    return tuple(plans), [*dict.fromkeys(notes)]


def _check(
    config: Config, fullest: SegmentPlan, plans: Sequence[SegmentPlan], memory: MemoryOfRun
) -> list[str]:
    """What `plan.check` has to say where the fullest of the plans that are to come does not fit.

    Raises:
        InputError: `plan.check` is error.
    """
    prediction = fullest.prediction
    if config.plan.check == "off" or not prediction.is_too_much:
        return []
    if not prediction.limit.is_own:
        return [
            f"memory: {memory_words(prediction)}: it would be refused here; "
            "parallel.memory=80GB compares it with the memory of the machines that it is for"
        ]
    needs, has = prediction.memory.total / 1e9, prediction.limit.size / 1e9
    print(f"{needs:.2f} GB are needed of {has:.2f} GB; looking for layouts that fit", flush=True)
    of_fullest = fullest.architecture, fullest.segment.freeze
    others = [each for each in plans if not each.trains(*of_fullest)]
    words = shortage_words(
        Shortage(
            prediction,
            fullest.segment.config_of(config),
            fullest.architecture,
            tuple((each.segment.config_of(config), each.architecture) for each in others),
            memory.world_size,
            memory.machine.ranks,
            memory.process,
            memory.device,
        )
    )
    if config.plan.check == "error":
        raise InputError(words)
    return words.splitlines()


@contextmanager
def told_of_phase(config: Config, number: int) -> Iterator[None]:
    """An InputError inside says of which phase it is, where there are several."""
    try:
        yield
    except InputError as error:
        if len(config.phases) < 2:
            raise
        raise InputError(f"phases.{number}: {error}") from None
