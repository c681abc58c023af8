"""Which steps of a run are of which phase, with what frozen: arithmetic on a config and a length.

No torch and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from parallel_clip.config import (
    Config,
    Freeze,
    PartlyFrozen,
    Phase,
    Until,
    boundaries,
    parse_until,
    training_sources,
)
from parallel_clip.data.order.run_order import ONE_ORDER, Stretch, find_stretches
from parallel_clip.errors import InputError
from parallel_clip.layout import training_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Segment:
    """Steps [first, stop) of a run, counted from 0, in which nothing changes.

    number: of its phase in `phases`, 0 where there are none; phase: what the config says of it; lr:
    the peak of its learning rates; freeze: what is frozen in it; blend: the number of that which it
    trains on, in `training_sources`.
    """

    first: int
    stop: int
    number: int
    phase: Phase
    lr: float
    freeze: Freeze
    blend: int

    def config_of(self, config: Config) -> Config:
        """`config` with what is frozen in this segment."""
        return config.model_copy(update={"freeze": self.freeze})


def find_segments(config: Config, steps: int) -> tuple[Segment, ...]:
    """The segments of a run of `steps` steps, in order, without gaps.

    Raises:
        InputError: a phase or a tower's thawing would begin before the first step, after the last,
            or not after the phase before.
    """
    last_steps = {
        key: last_step(until, key, steps, config.batch.global_)
        for key, until in boundaries(config).items()
    }
    ends = [last_steps[key] for key in last_steps if key.startswith("phases.")]
    _check_order(config, ends)
    phases, blends = config.phases or [Phase()], training_sources(config).of_phase
    segments = []
    for first, stop in pairwise(sorted({0, *last_steps.values(), steps})):
        number = sum(end <= first for end in ends)
        freeze = _freeze_at(config.freeze, first, last_steps)
        phase = phases[number]
        lr = config.optimizer.lr if phase.lr is None else phase.lr
        segments.append(Segment(first, stop, number, phase, lr, freeze, blends[number]))
    return tuple(segments)


def sample_stretches(segments: Iterable[Segment], global_batch: int) -> tuple[Stretch, ...]:
    """Which positions of a run are of the order of which blend."""
    return find_stretches((each.first * global_batch, each.blend) for each in segments)


def configured_stretches(config: Config) -> tuple[Stretch, ...]:
    """`sample_stretches` of a run of this config, whose length is only asked for where it counts.

    Raises:
        InputError: as `find_segments`.
    """
    if len(training_sources(config).blends) == 1:
        return ONE_ORDER
    steps = training_steps(config.train, 0, config.batch.global_, config.schedule)  # no epochs
    return sample_stretches(find_segments(config, steps), config.batch.global_)


def last_step(until: Until, key: str, steps: int, global_batch: int) -> int:
    """The last step, counted from 1, that ends by `until`; `key` says that. Only whole batches
    count, as for the length of a run.

    Raises:
        InputError: there is none, or it is the last of the run.
    """
    found = parse_until(until, key)
    if isinstance(found, Fraction):
        said, last = f"{key} {until} of {steps:,} steps", int(found * steps)
        least = f"{100 / steps:.3g}% or more"
    else:
        said, last = (
            f"{key} {until:,} pairs, in batches of {global_batch:,},",
            found // global_batch,
        )
        least = f"{global_batch:,} or more"
    if last == 0:
        raise InputError(f"{said} is less than one step; set it to {least}, or leave it out")
    if last >= steps:
        raise InputError(
            f"{said} is step {last:,}, and the run has {steps:,} steps: nothing would come after; "
            f"set it to less than {steps * global_batch:,} pairs, or train longer"
        )
    return last


def _check_order(config: Config, ends: Sequence[int]) -> None:
    for number, (before, end) in enumerate(pairwise(ends), start=1):
        if end <= before:
            untils = [phase.until for phase in config.phases]
            raise InputError(
                f"phases.{number}.until {untils[number]} is step {end:,}, and phases.{number - 1} "
                f"goes on until {untils[number - 1]}, step {before:,}: a phase has at least one "
                "step; give them in order, each later than the one before"
            )


def _freeze_at(freeze: Freeze, step: int, last_steps: dict[str, int]) -> Freeze:
    """What is frozen in step `step`, counted from 0."""
    thawed = [
        tower
        for tower in ("vision", "text")
        if isinstance(getattr(freeze, tower), PartlyFrozen)
        and last_steps.get(f"freeze.{tower}.unfreeze_at", step + 1) <= step
    ]
    return freeze.model_copy(update=dict.fromkeys(thawed))
