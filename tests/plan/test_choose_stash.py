"""How many microbatches keep their graphs: what the two keys come to."""

from types import SimpleNamespace

import pytest

from parallel_clip.errors import InputError
from parallel_clip.plan.layout_plan import choose_stash


def chosen(microbatches: int, schedule="auto", stash="auto", pipeline=1) -> int:
    parallel = SimpleNamespace(schedule=schedule, stash=stash, pipeline=pipeline)
    return choose_stash(parallel, microbatches)


@pytest.mark.parametrize(
    ("schedule", "stash", "expected"),
    [
        ("two-pass", "auto", 0),
        ("two-pass", 0, 0),
        ("stash", "auto", 6),
        ("stash", 6, 6),
        ("auto", 0, 0),
        ("auto", 2, 2),
        ("auto", 6, 6),
    ],
)
def test_what_is_asked_for_is_done(schedule, stash, expected):
    assert chosen(6, schedule, stash, pipeline=3) == expected


@pytest.mark.parametrize(
    ("microbatches", "pipeline", "expected"),
    [(1, 1, 1), (2, 1, 0), (1, 4, 1), (4, 4, 4), (5, 4, 0), (16, 8, 0)],
)
def test_auto_keeps_all_where_the_first_stage_of_1f1b_would(microbatches, pipeline, expected):
    assert chosen(microbatches, pipeline=pipeline) == expected


def test_more_than_there_are_is_refused():
    with pytest.raises(InputError) as refusal:
        chosen(6, stash=7)
    assert str(refusal.value) == (
        "parallel.stash 7 is more than the 6 microbatches of a step; set it to 6 or fewer, or to "
        "auto"
    )


@pytest.mark.parametrize(
    ("schedule", "stash", "keeps"),
    [("two-pass", 1, 0), ("two-pass", 6, 0), ("stash", 0, 6), ("stash", 5, 6), ("stash", 7, 6)],
)
def test_two_keys_that_contradict_one_another_are_refused(schedule, stash, keeps):
    with pytest.raises(InputError) as refusal:
        chosen(6, schedule, stash)
    assert str(refusal.value) == (
        f"parallel.schedule {schedule} keeps the graphs of {keeps} microbatches, and "
        f"parallel.stash is {stash}; set parallel.schedule to auto, or leave parallel.stash out"
    )
