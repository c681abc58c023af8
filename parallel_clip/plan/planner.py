"""`parallel-clip plan`: from a config and a number of GPUs to the layouts that train it best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from parallel_clip.config import Config, parse_bytes
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.errors import InputError
from parallel_clip.layout import divisors
from parallel_clip.model.architecture import Architecture
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.device_file import Device, read_device
from parallel_clip.plan.layout_plan import DoesNotFit, try_layout_plan
from parallel_clip.plan.phase_models import phase_models
from parallel_clip.plan.resume import ResumePoint
from parallel_clip.plan.search import (
    LayoutSearch,
    PlannedLayout,
    RefusedLayout,
    SearchResult,
    tensor_sizes,
    with_layout,
    with_micro,
)
from parallel_clip.plan.start_model import check_trainable, find_start_model
from parallel_clip.plan.step_peak import StepPeak, count_step
from parallel_clip.plan.step_time import predict_step


@dataclass(frozen=True)
class Question:
    """What is asked. gpu_memory: "80GB"; gpu: the name of a device or its file; layout: "tensor=2,
    pipeline=3" for one layout alone; max_batch: for the largest batch that fits; count: to count
    the first layout's memory by running its step."""

    config: Config
    gpus: int
    gpu_memory: str
    gpu: str = "h100"
    nodes_of: int = 8
    layout: str | None = None
    max_batch: bool = False
    count: bool = False


@dataclass(frozen=True)
class Answer:
    """What was found. question: with the batch of `max_batch` filled in; architecture: of the phase
    that was planned for; samples: of the whole run, None where epochs say it; notes: what there is
    to tell of it; counted: of the first layout's fullest stage, where it was asked for."""

    question: Question
    architecture: Architecture
    device: Device
    limit: int
    result: SearchResult
    samples: int | None
    notes: tuple[str, ...]
    counted: StepPeak | None = None

    def days(self, layout: PlannedLayout) -> float | None:
        """Of the whole run; None where its length is known by its data alone."""
        if self.samples is None:
            return None
        return self.samples / layout.time.samples_per_second / 86_400


def answer(question: Question) -> Answer:
    """Find the layouts. Opens no shard, writes nothing, touches no GPU.

    Raises:
        InputError: whatever is wrong with what is asked.
    """
    if has_cuda():
        return call_without_gpus(_answer, question)
    return _answer(question)


def _answer(question: Question) -> Answer:
    limit, device = _memory_limit(question.gpu_memory), read_device(question.gpu)
    notes = []
    if device.memory is not None and limit > device.memory:
        notes.append(
            f"--gpu-memory {question.gpu_memory} is more than the {device.memory / 1e9:.0f} GB of "
            f"{device.name}"
        )
    config, architecture, number = _model(question.config)
    if number is not None:
        notes.append(f"planned for phases.{number}, which costs most of the phases")

    costs = frozen_parts(architecture, config.freeze).costs_of(architecture)
    predict = partial(
        predict_step,
        architecture=architecture,
        device=device,
        nodes_of=question.nodes_of,
        costs=costs,
    )

    def search_of(config: Config) -> LayoutSearch:
        sizes = question.gpus, limit, question.nodes_of
        return LayoutSearch(config, architecture, *sizes, predict)

    if question.max_batch:
        config = _with_largest_batch(config, search_of(config))
        notes.append(f"--max-batch: batch.global {config.batch.global_:,} is the largest that fits")
    search = search_of(config)
    if question.layout is not None:
        found = search.one(_config_of_layout(config, question.layout))
        is_refused = isinstance(found, RefusedLayout)
        result = SearchResult(*(((), (found,)) if is_refused else ((found,), ())))
    else:
        result = search.run()
    counted = None
    if question.count and result.layouts:
        first = result.layouts[0]
        sizes = first.plan.layout
        rank = first.stage * sizes.data * sizes.tensor
        counted = count_step(first.config, architecture, first.plan, rank)
    return Answer(
        replace(question, config=config),
        architecture,
        device,
        limit,
        result,
        _samples(config),
        tuple(notes),
        counted,
    )


def _memory_limit(size: str) -> int:
    if size.strip().replace(".", "", 1).isdigit():
        raise InputError(f"--gpu-memory {size} has no unit; write {size}GB or {size}GiB")
    return parse_bytes(size, "--gpu-memory")


def _model(config: Config) -> tuple[Config, Architecture, int | None]:
    """The model, at the size of the phase that costs most, and that phase's number."""
    if config.model.name is not None:  # what it starts from changes no size, and may not be here
        nothing = config.init.model_copy(update={"from_": None, "vision": None, "text": None})
        config = config.model_copy(update={"init": nothing})
    start = find_start_model(config, ResumePoint())
    check_trainable(start.architecture, start.config.model.override)
    models = phase_models(start.config, start.architecture)
    number = max(range(len(models)), key=lambda n: models[n].costs.total)
    return start.config, models[number], number if len(models) > 1 else None


def _samples(config: Config) -> int | None:
    if config.train.samples is not None:
        return config.train.samples // config.batch.global_ * config.batch.global_
    return None if config.train.steps is None else config.train.steps * config.batch.global_


# ----------------------------------------------------------------------------- one layout by hand

_SIZES = ("tensor", "pipeline", "virtual_pipeline", "micro", "stash")
_WORDS = {"recompute": ("none", "selective", "full"), "schedule": ("auto", "two-pass", "stash")}


def _config_of_layout(config: Config, layout: str) -> Config:
    """The config with what `--layout` says; what it leaves out is as in the config."""
    given: dict[str, int | str] = {}
    for part in filter(None, layout.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key in _SIZES and value.isdecimal() and (int(value) >= 1 or key == "stash"):
            given[key] = int(value)
        elif value in _WORDS.get(key, ()):
            given[key] = value
        else:
            words = "; ".join(f"{name}={'|'.join(values)}" for name, values in _WORDS.items())
            raise InputError(
                f"--layout {layout}: {part!r} is none of {', '.join(f'{k}=N' for k in _SIZES)}; "
                f"{words}; such as tensor=2,pipeline=4,micro=64"
            )
    old = config.parallel
    found = with_layout(
        config,
        tensor=given.get("tensor", old.tensor),
        pad=old.pad,
        pipeline=given.get("pipeline", old.pipeline),
        virtual=given.get("virtual_pipeline", old.virtual_pipeline),
    )
    update = {name: given[name] for name in ("schedule", "stash") if name in given}
    if not update:
        update = {"schedule": old.schedule, "stash": old.stash}
    update["stages"] = old.stages
    found = found.model_copy(update={"parallel": found.parallel.model_copy(update=update)})
    found = with_micro(found, given.get("micro", config.batch.micro))
    return found.model_copy(update={"recompute": given.get("recompute", config.recompute)})


# -------------------------------------------------------------------------------- the largest batch


def _with_largest_batch(config: Config, search: LayoutSearch) -> Config:
    """The config with the largest batch of which some layout has room: with one pair in a
    microbatch, two passes and full recomputation, memory grows with the batch by its features and
    the loss alone."""
    best = 0
    layers = search.costs.vision.layers + search.costs.text.layers
    for tensor in tensor_sizes(search.gpus, search.nodes_of):
        for pipeline in filter(lambda size: size <= layers, divisors(search.gpus // tensor)):
            shape = with_layout(config, tensor=tensor, pad=True, pipeline=pipeline, virtual=1)
            shape = with_micro(shape, 1).model_copy(update={"recompute": "full"})
            data = search.gpus // tensor // pipeline
            fits = _fits_batch(shape, search, data)
            if not fits(1):
                continue
            low, high = 1, 2
            while fits(high) and high < 2**30:
                low, high = high, 2 * high
            while high - low > max(1, low // 64):
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            best = max(best, low * data)
    if best == 0:
        raise InputError(
            f"no batch fits: {config.model.name} needs more memory than {search.limit / 1e9:.1f} "
            f"GB on each of {search.gpus} GPUs for one pair; give more GPUs"
        )
    # So that GPUs and microbatches divide it: two leading binary digits, as people choose batches.
    unit = max(search.gpus, 1 << max(0, best.bit_length() - 3))
    unit = -(-unit // search.gpus) * search.gpus
    best = best // unit * unit or best
    batch = config.batch.model_copy(update={"global_": best})
    return config.model_copy(update={"batch": batch})


def _fits_batch(shape: Config, search: LayoutSearch, data: int) -> Callable[[int], bool]:
    def fits(pairs_of_rank: int) -> bool:
        batch = shape.batch.model_copy(update={"global_": pairs_of_rank * data})
        config = shape.model_copy(update={"batch": batch})
        plan = try_layout_plan(search.costs, search.gpus, config)
        if isinstance(plan, DoesNotFit):
            return False
        return search.step_memory(config, plan).fullest(0)[1].total <= search.limit

    return fits
