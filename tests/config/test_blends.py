"""Which sources a run has, and how its phases blend them."""

import pytest

from parallel_clip.config import config_from_dict, training_sources
from parallel_clip.errors import InputError

A, B, C = ({"shards": f"{name}.tar"} for name in "abc")


def config_of(train, *phases, length=None, **data):
    ends = [{"until": 10 * number} for number in range(1, len(phases))] + [{}]
    tree = {
        "train": length or {"steps": 100},
        "batch": {"global": 10, "micro": 5},
        "data": {"train": train, **data},
        "phases": [phase | end for phase, end in zip(phases, ends, strict=False)],
    }
    return config_from_dict(tree)


def found(train, *phases):
    """(file of each source, where it is named, blends, blend of each phase)"""
    found = training_sources(config_of(train, *phases))
    files = "".join(source.shards.removesuffix(".tar") for source in found.sources)
    return files, found.keys, found.blends, found.of_phase


def test_without_phases_the_sources_are_those_of_the_data():
    keys = ("data.train.0", "data.train.1")
    one = [A, B | {"weight": 2.0}]
    assert found(one) == ("ab", keys, ((1.0, 2.0),), (0,))
    assert found(one, {"lr": 0.1}, {}) == ("ab", keys, ((1.0, 2.0),), (0, 0))


def test_a_phase_has_sources_of_its_own_or_those_of_the_data():
    assert found([A], {}, {"sources": [B, C]}, {}) == (
        "abc",
        ("data.train.0", "phases.1.sources.0", "phases.1.sources.1"),
        ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)),
        (0, 1, 0),
    )
    whole = training_sources(config_of([A], {}, {"sources": [B, C]}, {}))
    assert (whole.phases_of(0), whole.phases_of(1)) == ([0, 2], [1])


def test_sources_are_numbered_as_phases_come_to_them():
    """So a phase that is added behind changes no number."""
    assert found([A], {"sources": [B]}, {})[:2] == ("ba", ("phases.0.sources.0", "data.train.0"))
    assert found([], {"sources": [B]}, {"sources": [A]})[0] == "ba"


def test_a_source_of_another_weight_is_the_same_source():
    heavy = A | {"weight": 3.0}
    assert found([A, B], {}, {"sources": [B, heavy]}) == (
        "ab",
        ("data.train.0", "data.train.1"),
        ((1.0, 1.0), (3.0, 1.0)),
        (0, 1),
    )


@pytest.mark.parametrize("change", [{"samples": 5}, {"caption_key": "alt"}, {"shards": ["a.tar"]}])
def test_a_source_that_is_read_otherwise_is_another_one(change):
    assert len(training_sources(config_of([A], {}, {"sources": [A | change]})).sources) == 2


def test_the_same_source_twice_in_a_phase_is_two():
    assert found([A, A], {}, {"sources": [A]}, {"sources": [A, A]}) == (
        "aa",
        ("data.train.0", "data.train.1"),
        ((1.0, 1.0), (1.0, 0.0)),
        (0, 1, 0),
    )


@pytest.mark.parametrize(
    ("train", "phases", "told"),
    [
        ([], [], "data.train names no shards; give some"),
        ([], [{}, {}], "data.train names no shards; give some"),
        ([], [{"sources": [A]}, {}], "data.train names no shards, and phases.1 has no sources"),
        ([A], [{"sources": [A]}, {"sources": [B]}], "data.train is of no use, as each of the"),
        ([A], [{}, {"sources": []}], "phases.1.sources is empty; name some, or leave it out"),
        ([A], [{"sources": [{"weight": 1.0}]}, {}], "phases.0.sources.0.shards is missing"),
        (
            [A],
            [{}, {"sources": [B | {"wieght": 2.0}]}],
            "unknown key phases.1.sources.0.wieght; did you mean phases.0.sources.0.weight",
        ),
        (
            [A],
            [{}, {"sources": [{"shards": "b.tar", "weight": 0.0}]}],
            "phases.1.sources.0.weight is 0.0; expected number > 0",
        ),
        (
            [A],
            [{}, {"sources": [B | {"caption_key": "alt", "caption_lines": True}]}],
            "phases.1.sources.0.caption_lines is for captions in .txt",
        ),
    ],
)
def test_what_is_no_choice_of_sources(train, phases, told):
    with pytest.raises(InputError, match=told):
        config_of(train, *phases)


def test_epochs_are_of_one_blend():
    with pytest.raises(InputError, match="train.epochs 2 counts passes over the sources, and"):
        config_of([A], {}, {"sources": [B]}, length={"epochs": 2.0})
    config_of([A], {}, {"sources": [A]}, length={"epochs": 2.0})
