"""Memory of the steps of a planned run beside what a rank has, and what is decided by that."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from parallel_clip.config import Config
from parallel_clip.engine.device import describe_device, has_cuda
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.device_file import Device, device_of_gpu, read_device
from parallel_clip.plan.layout_plan import LayoutPlan, stash_is_open
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.memory_limit import Machine, MemoryLimit, find_memory_limit
from parallel_clip.plan.prediction import Prediction
from parallel_clip.plan.rank_bytes import StepMemory, predict_step_memory
from parallel_clip.plan.rank_process import RankProcess, rank_process
from parallel_clip.plan.step_time import predict_step


class FittedPlan(NamedTuple):
    """A layout's plan with the microbatches that keep their graphs; what its stages hold and what
    is predicted, None where nothing asked for it; what there is to say."""

    plan: LayoutPlan
    held: tuple[RankMemory, ...] | None = None
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()


class MemoryOfRun:
    """Memory of the segments of one run. dry_run: what is counted is for people to see, so whole
    stages are."""

    def __init__(self, config: Config, world_size: int, machine: Machine, dry_run: bool):
        self._config, self._dry_run = config, dry_run
        self.world_size, self.machine = world_size, machine
        self.process: RankProcess = rank_process(config)

    @cached_property
    def limit(self) -> MemoryLimit | None:
        """What a rank has."""
        return find_memory_limit(self._config, self.machine)

    @cached_property
    def device(self) -> Device | None:
        """By whose figures the time of a step is predicted.

        Raises:
            InputError: `plan.device` is no device file.
        """
        if self._config.plan.device is not None:
            return read_device(self._config.plan.device)
        asks = has_cuda() and self.machine.asks_gpu
        return device_of_gpu(describe_device()) if asks else None

    def of(self, config: Config, model: Architecture, plan: LayoutPlan) -> FittedPlan:
        """A segment's plan. config: with what is frozen in it.

        Raises:
            InputError: the device file lacks figures that the layout needs.
        """
        parallel, predicts = config.parallel, config.plan.check != "off"
        is_open = stash_is_open(parallel)
        # A GPU is asked, and memory counted, only where something hangs on it.
        if not (predicts or self._dry_run or is_open and self._may_fill(plan)):
            return FittedPlan(plan)
        step = predict_step_memory(config, model, plan, self.process, whole_stages=self._dry_run)
        limit, notes = self.limit, ()
        if is_open and limit is not None and limit.to_fill is not None:
            plan = _with_largest_stash(plan, step, limit.to_fill)
            if parallel.memory is None and plan.batch.microbatches > 1:
                words = f"parallel.stash auto fills {limit.to_fill / 1e9:.1f} GB at most, of"
                notes = (f"{words} {limit.size / 1e9:.1f} GB {limit.words}",)
        if not predicts:
            return FittedPlan(plan, step.held, None, notes)
        stage, memory = step.fullest(plan.stash)
        prediction = Prediction(stage, memory, limit, has_cuda())
        if self.device is not None:
            costs = frozen_parts(model, config.freeze).costs_of(model)
            of_layout = plan, model, config, self.device, min(self.machine.ranks, self.world_size)
            seconds = predict_step(*of_layout, costs).seconds
            prediction = replace(prediction, seconds=seconds, device=self.device.name)
        return FittedPlan(plan, step.held, prediction, notes)

    def _may_fill(self, plan: LayoutPlan) -> bool:
        """Whether more or fewer graphs may be kept by the memory that there is."""
        if self._config.parallel.memory is not None:
            return True
        on_gpu = has_cuda() and self.machine.asks_gpu
        return on_gpu and plan.stash < plan.batch.microbatches


def _with_largest_stash(plan: LayoutPlan, step: StepMemory, limit: int) -> LayoutPlan:
    """The plan with as many stashed microbatches as fit; where not even two-pass does, with
    two-pass, which takes least. One microbatch alone takes no more when its graph is kept."""
    if plan.batch.microbatches == 1:
        return plan
    return replace(plan, stash=step.largest_stash(limit) or 0)
