"""Rank arithmetic: which rank does what, how a batch is split, how many steps a run has.

A size that does not fit is an InputError with the nearest sizes that do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.stages.padding import padding_words

if TYPE_CHECKING:
    from parallel_clip.config import LearningRateSchedule, Train
    from parallel_clip.stages.costs import ModelCosts


class Coordinates(NamedTuple):
    """A rank's place along each kind of parallelism, each counted from 0."""

    data: int
    tensor: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """How `world` processes are dealt to data, tensor and pipeline parallelism.

    Raises:
        InputError: `world` is not a multiple of tensor × pipeline, or there are virtual stages
            without a pipeline.
    """

    world: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        check_virtual_pipeline(self.pipeline, self.virtual_pipeline)
        copy = self.tensor * self.pipeline
        if self.world % copy == 0:
            return
        worlds = _listed(multiples_around(self.world, copy))
        others = _listed(d for d in divisors(self.world) if self.world % (d * self.pipeline) == 0)
        remedy = f"start {worlds} processes"
        if others:
            remedy += f", or set parallel.tensor to {others}"
        raise InputError(
            f"{self.world} processes cannot be split by parallel.tensor {self.tensor} × "
            f"parallel.pipeline {self.pipeline} = {copy}; {remedy}"
        )

    @property
    def data(self) -> int:
        """The number of data-parallel ranks: copies of the model."""
        return self.world // (self.tensor * self.pipeline)

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands, in megatron-core's default order: tensor fastest, pipeline slowest.

        Tensor ranks are neighbours so that their traffic, the heaviest, stays within a node.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not one of {self.world}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(data, tensor, pipeline)


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step in pairs: each data-parallel rank runs `microbatches` of `micro_batch`. A
    pair is a picture with its `captions` texts."""

    global_batch: int
    micro_batch: int
    per_rank: int
    microbatches: int
    captions: int = 1


def plan_batch(layout: Layout, global_batch: int, micro_batch: int, captions: int = 1) -> BatchPlan:
    """Deal the global batch to the data-parallel ranks and cut each share into microbatches.

    Raises:
        InputError: it does not divide; the message has the nearest sizes that do.
    """
    unit = micro_batch * layout.data
    if global_batch % unit == 0:
        per_rank = global_batch // layout.data
        return BatchPlan(global_batch, micro_batch, per_rank, per_rank // micro_batch, captions)

    remedy = f"set batch.global to {_listed(multiples_around(global_batch, unit))}"
    if global_batch % layout.data == 0:
        fitting = divisors(global_batch // layout.data)
        below = [size for size in fitting if size < micro_batch][-1:]
        above = [size for size in fitting if size > micro_batch][:1]
        remedy += f", or batch.micro to {_listed(below + above)}"
    raise InputError(
        f"batch.global {global_batch} is not divisible by batch.micro {micro_batch} × "
        f"data-parallel {layout.data} = {unit}; {remedy}"
    )


def check_virtual_pipeline(pipeline: int, virtual_pipeline: int) -> None:
    """See that there is a pipeline where there are virtual stages.

    Raises:
        InputError: there is none.
    """
    if virtual_pipeline > 1 and pipeline == 1:
        raise InputError(
            f"parallel.virtual_pipeline {virtual_pipeline} needs parallel.pipeline of at least 2; "
            "set one or the other"
        )


def check_microbatches(layout: Layout, plan: BatchPlan) -> None:
    """See that there are enough microbatches for virtual stages: one for each rank of a pipeline,
    or a rank would have to work on two of its chunks at once.

    Raises:
        InputError: there are fewer.
    """
    needed = layout.pipeline if layout.virtual_pipeline > 1 else 1
    if plan.microbatches >= needed:
        return
    remedies = [f"batch.global to {layout.data * needed * plan.micro_batch} or more"]
    if plan.per_rank >= needed:
        fitting = [size for size in divisors(plan.per_rank) if plan.per_rank // size >= needed]
        remedies.insert(0, f"batch.micro to {fitting[-1]} or less")
    raise InputError(
        f"parallel.virtual_pipeline {layout.virtual_pipeline} needs at least as many microbatches "
        f"as parallel.pipeline {layout.pipeline}; there are {plan.microbatches} of batch.micro "
        f"{plan.micro_batch}; set {', or '.join(remedies)}, or parallel.virtual_pipeline to 1"
    )


def check_model(tensor: int, costs: ModelCosts, pad: bool = False) -> None:
    """Check that so many tensor ranks can share a model. pad: `parallel.pad`, with which any number
    can.

    Raises:
        InputError: the tensor size does not divide what is split of both towers; the message has
            the sizes that do, and what it would cost to pad.
    """
    if pad:
        return
    common, refusing = 0, []
    for name, tower in (("vision", costs.vision), ("text", costs.text)):
        common = gcd(common, *(units.count for units in tower.split_units))
        uneven = [f"{u.count} {u.name}" for u in tower.split_units if u.count % tensor]
        if uneven:
            refusing.append(f"the {' and '.join(uneven)} of the {name} tower")
    if refusing:
        raise InputError(
            f"parallel.tensor {tensor} does not divide {', nor '.join(refusing)} of "
            f"{costs.name}; parallel.tensor may be {_listed(divisors(common))}, or any size with "
            f"parallel.pad=true ({padding_words(costs, tensor)})"
        )


def training_steps(
    train: Train, samples_per_epoch: int, global_batch: int, schedule: LearningRateSchedule
) -> int:
    """The length of the run in optimizer steps; only whole batches count.

    Raises:
        InputError: it is shorter than one step, or than the phases of its schedule.
    """
    steps = train.steps or _whole_batches(train, samples_per_epoch, global_batch)
    if schedule.kind == "wsd" and schedule.warmup + schedule.cooldown > steps:
        raise InputError(
            f"schedule.warmup {schedule.warmup} + schedule.cooldown {schedule.cooldown} are more "
            f"than the run's {steps} steps; shorten one, or train longer"
        )
    return steps


def _whole_batches(train: Train, samples_per_epoch: int, global_batch: int) -> int:
    if train.samples is not None:
        samples, given = Fraction(train.samples), f"train.samples {train.samples}"
        enough = f"train.samples to at least {global_batch}"
    else:
        # By the decimals that the user wrote: 0.1 × 30 samples are 3 and not a hair less.
        samples = Fraction(repr(train.epochs)) * samples_per_epoch
        given = f"train.epochs {train.epochs:g} of {samples_per_epoch} samples"
        enough = f"train.epochs to at least {-(-global_batch * 1000 // samples_per_epoch) / 1000:g}"
    steps = int(samples / global_batch)
    if steps == 0:
        raise InputError(
            f"{given} is less than one batch of batch.global {global_batch}; set {enough}, or "
            f"batch.global to at most {int(samples)}"
        )
    return steps


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples_around(number: int, unit: int) -> list[int]:
    """The nearest positive multiples of `unit` below and above `number`, no multiple itself."""
    below = number // unit * unit
    return [size for size in (below, below + unit) if size]


def _listed(sizes: Iterable[int]) -> str:
    """'1, 2 or 4'."""
    *first, last = [str(size) for size in sizes] or [""]
    return f"{', '.join(first)} or {last}" if first else last
