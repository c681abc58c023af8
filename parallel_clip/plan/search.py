"""All layouts of a model on a number of GPUs that fit into their memory, the quickest first.

What is tried: tensor sizes that divide a node, padded where they do not divide the model; pipelines
of as many stages as both towers have layers; 1, 2, 3, 4, 6 or 8 virtual stages a rank, where a step
has whole groups of microbatches; microbatches that divide a data rank's share; each kind of
recomputation; the largest stash that fits. Sequence parallelism is on wherever the tensor size is
above 1, and the optimizer's state is split over the data ranks: both save memory and cost no time.

What is passed over, since it cannot be better than what was found: microbatches larger than one
that does not fit with full recomputation, as memory grows with them; microbatches so small that a
step has more than 32 rounds of the pipeline, where larger ones fit with as little recomputation;
and more recomputation where all graphs are kept without.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from parallel_clip.config import Config
from parallel_clip.engine.groups import can_be_forked
from parallel_clip.errors import InputError
from parallel_clip.layout import check_model, divisors
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.fast_memory import FastMemory
from parallel_clip.plan.layout_plan import DoesNotFit, LayoutPlan, try_layout_plan
from parallel_clip.plan.rank_bytes import RankBytes, StepMemory
from parallel_clip.plan.rank_process import GPU_PROCESS, RankProcess
from parallel_clip.stages.costs import ModelCosts

if TYPE_CHECKING:
    from parallel_clip.plan.step_time import StepTime

RECOMPUTES = ("none", "selective", "full")
VIRTUAL = (1, 2, 3, 4, 6, 8)
# Rounds of a pipeline in a step: with so many the bubble is at most a part of 33, and smaller
# microbatches cannot gain what they cost.
MOST_ROUNDS = 32


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that fits. config: that trains in it; memory: of `stage`, the fullest."""

    config: Config
    plan: LayoutPlan
    stage: int
    memory: RankBytes
    time: StepTime


@dataclass(frozen=True)
class RefusedLayout:
    """A layout that does not fit, with its least microbatch and most recomputation. needs_bytes: of
    a GPU; None where its sizes do not divide."""

    config: Config
    reason: str
    needs_bytes: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """layouts: the quickest first."""

    layouts: tuple[PlannedLayout, ...]
    refused: tuple[RefusedLayout, ...]


class LayoutSearch:
    """Of one model on `gpus` GPUs of `limit` bytes each, `nodes_of` in a node. predict: the time of
    a step, of a LayoutPlan and `config=`; process: of a rank."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        gpus: int,
        limit: int,
        nodes_of: int,
        predict: Callable[..., StepTime],
        process: RankProcess = GPU_PROCESS,
    ):
        self.config, self._architecture = config, architecture
        self.gpus, self.limit, self.nodes_of = gpus, limit, nodes_of
        self.predict, self.process = predict, process
        self.memory = FastMemory(config, architecture)
        self.costs: ModelCosts = frozen_parts(architecture, config.freeze).costs_of(architecture)

    def run(self) -> SearchResult:
        """Try all layouts, in a process for each core where this process can be forked."""
        sizes, found, refused = tensor_sizes(self.gpus, self.nodes_of), [], []
        for fitting, refusals in self._on_cores(sizes):
            found += fitting
            refused += refusals
        return SearchResult(tuple(sorted(found, key=_rank)), tuple(refused))

    def _on_cores(self, sizes: list[int]) -> list[tuple[list, list]]:
        cores = min(len(sizes), os.cpu_count() or 1)
        forks = can_be_forked() and "fork" in multiprocessing.get_all_start_methods()
        if cores == 1 or not forks:
            return [self._of_tensor_size(size) for size in sizes]
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(cores, context) as pool:
            if pool.submit(_can_go_backward).result():
                return list(pool.map(self._of_tensor_size, sizes))
        return [self._of_tensor_size(size) for size in sizes]

    def _of_tensor_size(self, tensor: int) -> tuple[list[PlannedLayout], list[RefusedLayout]]:
        found: list[PlannedLayout] = []
        refused: list[RefusedLayout] = []
        with _no_garbage_collection():
            for shape in self._shapes(tensor):
                fitting, refusal = self._try_shape(shape)
                found += fitting
                if not fitting and refusal is not None:
                    refused.append(refusal)
        return found, refused

    def one(self, config: Config) -> PlannedLayout | RefusedLayout:
        """The layout of `config`, with the largest stash that fits where it leaves that open.

        Raises:
            InputError: its sizes do not divide.
        """
        plan = try_layout_plan(self.costs, self.gpus, config)
        if isinstance(plan, DoesNotFit):
            raise InputError(plan.reason)
        return self._fit(config, plan)

    # ------------------------------------------------------------------------------- what is tried

    def _shapes(self, tensor: int) -> Iterator[Config]:
        """A config for each pipeline and virtual pipeline size."""
        layers = self.costs.vision.layers + self.costs.text.layers
        pad = not divides(tensor, self.costs)
        for pipeline in divisors(self.gpus // tensor):
            for virtual in VIRTUAL if pipeline > 1 else VIRTUAL[:1]:
                if pipeline * virtual <= layers:
                    yield with_layout(
                        self.config, tensor=tensor, pad=pad, pipeline=pipeline, virtual=virtual
                    )

    def _try_shape(self, shape: Config) -> tuple[list[PlannedLayout], RefusedLayout | None]:
        """What fits of a shape; where nothing does, why the smallest does not."""
        parallel = shape.parallel
        data = self.gpus // (parallel.tensor * parallel.pipeline)
        smallest = with_micro(shape, 1).model_copy(update={"recompute": RECOMPUTES[-1]})
        if shape.batch.global_ % data or parallel.virtual_pipeline > 1:
            # Whole groups of microbatches alone are tried.
            plan = try_layout_plan(self.costs, self.gpus, smallest)
            if isinstance(plan, DoesNotFit):
                return [], RefusedLayout(smallest, plan.reason)
        per_rank = shape.batch.global_ // data
        fitting, refusal = [], None
        for micro in divisors(per_rank):
            config = with_micro(smallest, micro)
            if parallel.virtual_pipeline > 1 and per_rank // micro % parallel.pipeline:
                continue
            plan = try_layout_plan(self.costs, self.gpus, config)
            if isinstance(plan, DoesNotFit):
                return [], RefusedLayout(config, plan.reason)
            step = self.step_memory(config, plan)
            stage, memory = step.fullest(0)
            if memory.total > self.limit:
                refusal = self._refused(config, stage, memory)
                break
            fitting.append(micro)
        enough = [
            micro for micro in fitting if per_rank // micro <= MOST_ROUNDS * parallel.pipeline
        ]
        tried = enough or fitting[-1:]
        found = [
            layout for micro in tried for layout in self._recomputations(with_micro(shape, micro))
        ]
        smaller = [micro for micro in fitting if micro < tried[0]]
        return found + self._less_recomputation(shape, smaller, found), refusal

    def _less_recomputation(
        self, shape: Config, smaller: list[int], found: list[PlannedLayout]
    ) -> list[PlannedLayout]:
        """Layouts with less recomputation than any of `found`, for which smaller microbatches have
        room: of each kind the largest that fits."""
        more = []
        for recompute in RECOMPUTES[:-1]:
            if any(layout.config.recompute == recompute for layout in found):
                break
            for micro in reversed(smaller):
                config = with_micro(shape, micro).model_copy(update={"recompute": recompute})
                fitted = self._fit(config, try_layout_plan(self.costs, self.gpus, config))
                if isinstance(fitted, PlannedLayout):
                    more.append(fitted)
                    break
        return more

    def _recomputations(self, shape: Config) -> Iterator[PlannedLayout]:
        for recompute in RECOMPUTES:
            config = shape.model_copy(update={"recompute": recompute})
            plan = try_layout_plan(self.costs, self.gpus, config)
            fitted = self._fit(config, plan)
            if isinstance(fitted, PlannedLayout):
                yield fitted
                if fitted.plan.stash == plan.batch.microbatches:
                    return

    # ------------------------------------------------------------------------------ what it takes

    def _fit(self, config: Config, plan: LayoutPlan) -> PlannedLayout | RefusedLayout:
        step = self.step_memory(config, plan)
        parallel = config.parallel
        is_open = (parallel.schedule, parallel.stash) == ("auto", "auto")
        stash = step.largest_stash(self.limit) if is_open else plan.stash
        stage, memory = step.fullest(stash or 0)
        if stash is None or memory.total > self.limit:
            return self._refused(config, stage, memory)
        plan = replace(plan, stash=stash)
        config = with_stash(config, stash, plan.batch.microbatches)
        return PlannedLayout(config, plan, stage, memory, self.predict(plan, config=config))

    def _refused(self, config: Config, stage: int, memory: RankBytes) -> RefusedLayout:
        reason = f"stage {stage} needs {memory.total / 1e9:.1f} GB of {self.limit / 1e9:.1f} GB"
        return RefusedLayout(config, reason, memory.total)

    def step_memory(self, config: Config, plan: LayoutPlan) -> StepMemory:
        held = self.memory.stages(config, plan)
        return StepMemory(plan, held, self.memory, config.recompute, self.process)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Timelines of deep pipelines are millions of tuples, which the collector would look through
    again and again: a third of a search's time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _can_go_backward() -> bool:
    """False in a process forked from one that has gone backward, for which autograd has threads."""
    try:
        torch.zeros((), requires_grad=True).backward()
    except RuntimeError:
        return False
    return True


def tensor_sizes(gpus: int, nodes_of: int) -> list[int]:
    """Those that divide the GPUs, and of which a node has whole copies."""
    node = min(gpus, nodes_of)
    return [size for size in divisors(gpus) if size <= node and node % size == 0]


def with_layout(config: Config, tensor: int, pad: bool, pipeline: int, virtual: int) -> Config:
    """The config with a layout, whose stash is still open."""
    update = {
        "tensor": tensor,
        "pad": pad,
        "sequence": tensor > 1,
        "pipeline": pipeline,
        "virtual_pipeline": virtual,
        "stages": None,
        "schedule": "auto",
        "stash": "auto",
        "memory": None,
        "distributed_optimizer": True,
    }
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def with_micro(config: Config, micro: int) -> Config:
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro": micro})})


def with_stash(config: Config, stash: int, microbatches: int) -> Config:
    """The config that keeps so many graphs, by the name that says it best."""
    schedule = {0: "two-pass", microbatches: "stash"}.get(stash, "auto")
    update = {"schedule": schedule, "stash": stash}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)})


def divides(tensor: int, costs: ModelCosts) -> bool:
    """Whether a tensor size divides the model, which else is padded."""
    try:
        check_model(tensor, costs)
    except InputError:
        return False
    return True


def _rank(layout: PlannedLayout) -> tuple:
    """The quickest first; of equals the fewest stages, the smallest tensor size, the emptiest."""
    parallel = layout.plan.layout
    sizes = parallel.pipeline, parallel.virtual_pipeline, parallel.tensor
    return layout.time.seconds, *sizes, layout.memory.total
