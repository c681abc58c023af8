"""When bad samples are evidence, against exact arithmetic."""

from fractions import Fraction
from math import comb

import pytest

from parallel_clip.training.bad_fraction import is_above


def probabilities_of_as_many(seen: int, fraction: Fraction) -> list[Fraction]:
    """P(X >= bad) for X of Bin(seen, fraction), for bad from 0 to 60, in whole numbers."""
    part, whole = fraction.numerator, fraction.denominator
    left, found = whole**seen, []
    for bad in range(min(seen, 60) + 1):
        found.append(Fraction(left, whole**seen))
        left -= comb(seen, bad) * part**bad * (whole - part) ** (seen - bad)
    return found


@pytest.mark.parametrize("fraction", ["0", "0.002", "0.01", "0.1", "0.5", "1"])
@pytest.mark.parametrize("seen", [1, 8, 60, 301])
def test_as_exact_arithmetic_has_it(seen, fraction):
    for bad, probability in enumerate(probabilities_of_as_many(seen, Fraction(fraction))):
        assert is_above(bad, seen, float(fraction)) == (probability < Fraction(1, 1000)), bad


def test_one_early_bad_sample_is_no_evidence():
    assert not is_above(1, 8, 0.01)
    assert not is_above(2, 8, 0.01)
    assert is_above(4, 8, 0.01)
    assert is_above(1, 8, 0)


def test_a_source_that_is_bad_throughout_is_found_soon():
    assert next(seen for seen in range(1, 100) if is_above(seen, seen, 0.01)) == 2
    assert next(k for k in range(10, 10_000, 10) if is_above(k // 10, k, 0.05)) < 300


def test_two_billion_samples_take_no_time():
    assert is_above(20_200_000, 2_000_000_000, 0.01)
    assert not is_above(20_001_000, 2_000_000_000, 0.01)
