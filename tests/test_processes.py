"""The processes that other tests run on: a failure on any rank must fail the test, and soon."""

import time

import pytest

from parallel_clip.layout import Layout
from tests.engine import group_cases


def test_each_rank_answers(processes):
    answers = processes.run(Layout(2), group_cases.say, word="hello")
    assert answers == ["0 of 2: hello", "1 of 2: hello"]


def test_a_failing_rank_fails_the_test_with_its_traceback(processes):
    processes.run(Layout(2), group_cases.say, word="start")
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception) as failure:
        processes.run(Layout(2), group_cases.fail_alone, rank=1)
    assert "--- rank 1" in str(failure.value) and "no such number" in str(failure.value)
    assert time.monotonic() - began < 60


def test_a_hanging_or_dying_rank_fails_the_test_and_is_replaced(processes):
    processes.run(Layout(2), group_cases.say, word="start")  # the limit is for the case alone
    with pytest.raises(pytest.fail.Exception, match="rank 0\nstill running"):
        processes.run(Layout(2), group_cases.wait_alone, rank=0, seconds=3)
    with pytest.raises(pytest.fail.Exception, match="rank 1\nthe process died"):
        processes.run(Layout(2), group_cases.die, rank=1)
    assert processes.run(Layout(2), group_cases.say, word="again")[1] == "1 of 2: again"
