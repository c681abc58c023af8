"""Which steps are bad, and how many a run may have."""

import math

import pytest

from parallel_clip.config import BadSteps
from parallel_clip.errors import BadStepsError
from parallel_clip.training.bad_steps import BadStepPolicy

NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("loss", "grad_norm", "words"),
    [
        (1.0, 2.0, None),
        (NAN, 2.0, "the loss is nan"),
        (INFINITE, NAN, "the loss is inf"),
        (1.0, NAN, "the gradient norm is nan"),
        (1.0, INFINITE, "the gradient norm is inf"),
    ],
)
def test_what_is_not_finite_is_bad(loss, grad_norm, words):
    complaint = BadStepPolicy(BadSteps()).complaint(loss, grad_norm)
    assert complaint is None if words is None else words in complaint


def test_a_spike_is_told_by_the_median_of_the_window():
    policy = BadStepPolicy(BadSteps(spike=3.0, window=20))
    for norm in (1.0,) * 9:
        policy.count_good(norm)
        assert policy.complaint(1.0, 100.0) is None, "too few to say"
    policy.count_good(1.0)
    assert "3 times the usual 1" in policy.complaint(1.0, 3.01)
    assert policy.complaint(1.0, 3.0) is None
    for _ in range(20):
        policy.count_good(2.0)
    assert policy.complaint(1.0, 6.0) is None and policy.complaint(1.0, 6.1) is not None


def test_halt_ends_at_the_first():
    with pytest.raises(BadStepsError, match="step 7: the loss is nan"):
        BadStepPolicy(BadSteps()).count_bad(7, "the loss is nan")


def test_skip_allows_so_many_in_a_window():
    policy = BadStepPolicy(BadSteps(action="skip", limit=2, window=10))
    for step in (1, 5, 11, 15):  # never more than two in ten
        policy.count_bad(step, "bad")
    assert policy.skipped == [11, 15]
    with pytest.raises(BadStepsError, match="bad step 3 of the last 10, and bad_steps.limit is 2"):
        policy.count_bad(20, "bad")


def test_what_is_remembered_goes_on():
    first = BadStepPolicy(BadSteps(action="skip", limit=1, spike=2.0))
    for norm in range(1, 12):
        first.count_good(float(norm))
    first.count_bad(12, "bad")
    second = BadStepPolicy(
        BadSteps(action="skip", limit=1, spike=2.0), tuple(first.grad_norms), tuple(first.skipped)
    )
    assert second.complaint(1.0, 13.0) == first.complaint(1.0, 13.0) is not None
    with pytest.raises(BadStepsError):
        second.count_bad(20, "bad")
