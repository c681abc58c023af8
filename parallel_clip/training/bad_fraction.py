"""Whether the bad samples of a run so far are evidence that too many of all are bad."""

from __future__ import annotations

import math

_IMPROBABLE = 0.001  # of a bound that holds with 99.9%


def is_above(bad: int, seen: int, fraction: float) -> bool:
    """Whether the one-sided 99.9% lower bound of the part of bad samples is above `fraction`.

    The bound of Clopper and Pearson (Biometrika 26, 1934): it is, where so many bad ones or more
    would be found among `seen` with a probability below 0.1% if `fraction` of all were bad.
    """
    if bad <= fraction * seen:  # at fraction 1, always
        return False
    return fraction == 0 or _binomial_tail(bad, seen, fraction) < _IMPROBABLE


def _binomial_tail(least: int, trials: int, chance: float) -> float:
    """The probability of `least` successes or more, which are more than are expected."""
    term = math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(least + 1)
        - math.lgamma(trials - least + 1)
        + least * math.log(chance)
        + (trials - least) * math.log1p(-chance)
    )
    total, count, odds = 0.0, least, chance / (1 - chance)
    while term > 1e-9 * total:  # terms shrink, each faster than the one before; or are 0 at once
        total += term
        term *= (trials - count) / (count + 1) * odds
        count += 1
    return total
