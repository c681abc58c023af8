"""Where phases of a run end and frozen towers are thawed, as a config says it: `until` and
`unfreeze_at`, a share of the run's steps or a number of pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from parallel_clip.config.keys import Config, PartlyFrozen, Until
from parallel_clip.errors import InputError

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *%")


def parse_until(until: Until, key: str) -> Fraction | int:
    """90% is the Fraction 9/10 of a run, 4000 is so many pairs; `key` is where the user wrote it.

    Raises:
        InputError: `until` is neither, or no share between 0% and 100%.
    """
    if isinstance(until, int):
        return until
    parts = _SHARE.fullmatch(until.strip())
    if parts is None:
        raise InputError(
            f"{key} {until!r} is neither a share of the run's steps, such as 90%, nor a number of "
            "pairs, such as 4000"
        )
    share = Fraction(parts[1]) / 100
    if not 0 < share < 1:
        raise InputError(
            f"{key} {until} is no part of a run; expected more than 0% and less than 100%"
        )
    return share


def boundaries(config: Config) -> dict[str, Until]:
    """All that a config says of when something changes, by the key that says it."""
    found = {
        f"phases.{number}.until": phase.until
        for number, phase in enumerate(config.phases)
        if phase.until is not None
    }
    for tower in ("vision", "text"):
        how = getattr(config.freeze, tower)
        if isinstance(how, PartlyFrozen) and how.unfreeze_at is not None:
            found[f"freeze.{tower}.unfreeze_at"] = how.unfreeze_at
    return found


def has_shares(config: Config) -> bool:
    """Whether something changes at a step that depends on the run's length."""
    return any(isinstance(until, str) for until in boundaries(config).values())


def check_phases(config: Config) -> Iterator[str]:
    """What is wrong with `phases` and `unfreeze_at`, whatever the run's length."""
    for key, until in boundaries(config).items():
        try:
            parse_until(until, key)
        except InputError as error:
            yield str(error)
    phases, last = config.phases, len(config.phases) - 1
    for number, phase in enumerate(phases):
        if number == last and phase.until is not None:
            yield (
                f"phases.{number}.until {phase.until} is of the last phase, which goes on to the "
                "end of the run; leave it out, or add a phase"
            )
        elif number < last and phase.until is None:
            yield (
                f"phases.{number}.until is missing: each phase but the last says where it ends, "
                "such as 90% of the run's steps, or a number of pairs"
            )
        if phase.lr is not None and config.schedule.min_lr > phase.lr:
            yield (
                f"schedule.min_lr {config.schedule.min_lr:g} is above phases.{number}.lr "
                f"{phase.lr:g}"
            )
    size = config.model.image_size
    if size is not None and phases and all(phase.resolution is not None for phase in phases):
        yield (
            f"model.image_size {size} is of no use, as each of the phases has a resolution; leave "
            "it out, or one of these"
        )
