"""Which steps are of which phase, by hand; and what is told where that cannot be."""

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.errors import InputError
from parallel_clip.plan.segments import configured_stretches, find_segments

BATCH = 10


def config_of(phases=(), freeze=None, **sections):
    tree = {
        "train": {"steps": 20},
        "batch": {"global": BATCH, "micro": 5},
        "data": {"train": [{"shards": "a.tar"}]},
        "optimizer": {"lr": 0.1},
        "phases": list(phases),
        "freeze": freeze or {},
    }
    return config_from_dict(tree | sections)


def table(steps: int, phases=(), freeze=None) -> list[tuple]:
    """(first, stop, phase, lr, frozen towers) of each segment."""
    return [
        (s.first, s.stop, s.number, s.lr, [t for t in ("vision", "text") if getattr(s.freeze, t)])
        for s in find_segments(config_of(phases, freeze), steps)
    ]


def test_a_run_without_phases_is_one_segment():
    assert table(20) == [(0, 20, 0, 0.1, [])]
    assert table(20, [{"lr": 0.2}]) == [(0, 20, 0, 0.2, [])], "one phase is all of it"
    assert table(20, freeze={"text": "all"}) == [(0, 20, 0, 0.1, ["text"])]


def test_shares_are_of_the_steps_and_numbers_of_pairs():
    """Both from the beginning of the run; only whole batches count."""
    phases = [{"until": "90%", "lr": 0.2}, {}]
    assert table(20, phases) == [(0, 18, 0, 0.2, []), (18, 20, 1, 0.1, [])]
    assert [row[:2] for row in table(15, phases)] == [(0, 13), (13, 15)]
    phases = [{"until": "33.3 %"}, {"until": 129}, {"lr": 0.0}]
    assert table(20, phases) == [(0, 6, 0, 0.1, []), (6, 12, 1, 0.1, []), (12, 20, 2, 0.0, [])]


def test_decimals_are_those_that_are_written():
    phases = [{"until": "29%"}, {}]
    assert table(100, phases)[0][1] == 29, "0.29 × 100 is less, in binary"


def test_towers_are_thawed_inside_a_phase_or_with_one():
    freeze = {"vision": {"unfreeze_at": "25%"}, "text": {"unfreeze_at": 100, "norms": True}}
    phases = [{"until": "50%"}, {}]
    assert table(20, phases, freeze) == [
        (0, 5, 0, 0.1, ["vision", "text"]),
        (5, 10, 0, 0.1, ["text"]),
        (10, 20, 1, 0.1, []),
    ]


def test_samples_are_of_the_sources_of_their_phase():
    """From a whole batch on; what is thawed or another learning rate changes no order."""
    other = {"sources": [{"shards": "b.tar"}]}
    phases = [{"until": "50%"}, {"until": 129, "lr": 0.2, **other}, {"until": 150, **other}, {}]
    freeze = {"vision": {"unfreeze_at": "25%"}}
    assert [s.blend for s in find_segments(config_of(phases, freeze), 20)] == [0, 0, 1, 1, 0]
    assert configured_stretches(config_of(phases, freeze)) == (
        (0, 0, 0),
        (100, 1, 0),
        (150, 0, 100),
    )
    assert configured_stretches(config_of([{"until": "50%"}, {}])) == ((0, 0, 0),)


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        (
            [{"until": "50%"}, {"until": 104}, {}],
            r"phases.1.until 104 is step 10, and phases.0 goes on until 50%, step 10",
        ),
        ([{"until": "50%"}, {"until": "20%"}, {}], "phases.1.until 20% is step 4, .* in order"),
        ([{"until": "4%"}, {}], "until 4% of 20 steps is less than one step; set it to 5% or more"),
        ([{"until": 9}, {}], "until 9 pairs, in batches of 10, is less than one .* 10 or more"),
        ([{"until": 200}, {}], "is step 20, and the run has 20 steps: .* less than 200 pairs"),
        ([{"until": 10**6}, {}], "until 1,000,000 pairs.*is step 100,000, and the run has 20"),
    ],
)
def test_what_is_no_order_of_phases(phases, told):
    with pytest.raises(InputError, match=told):
        find_segments(config_of(phases), 20)


def test_thawing_is_inside_the_run():
    freeze = {"vision": {"unfreeze_at": "1%"}}
    with pytest.raises(InputError, match=r"freeze.vision.unfreeze_at 1% of 20 steps is less than"):
        find_segments(config_of(freeze=freeze), 20)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"phases": [{}, {}]}, "phases.0.until is missing: each phase but the last says"),
        ({"phases": [{"until": "50%"}]}, "phases.0.until 50% is of the last phase"),
        ({"phases": [{"until": "half"}, {}]}, "phases.0.until 'half' is neither a share"),
        ({"phases": [{"until": "0%"}, {}]}, "phases.0.until 0% is no part of a run"),
        ({"phases": [{"until": "100%"}, {}]}, "phases.0.until 100% is no part of a run"),
        ({"phases": [{"until": 0.9}, {}]}, r"phases.0.until is 0.9; expected text or integer ≥ 1"),
        ({"phases": [{"patch_dropout": 1.0}]}, "phases.0.patch_dropout is 1.0; expected number"),
        ({"phases": [{"batch": 3}]}, "unknown key phases.0.batch"),
        (
            {"phases": [{"lr": 0.01}], "schedule": {"min_lr": 0.02}},
            "schedule.min_lr 0.02 is above phases.0.lr 0.01",
        ),
        (
            {"phases": [{"resolution": 32}], "model": {"image_size": 64}},
            "model.image_size 64 is of no use, as each of the phases has a resolution",
        ),
        ({"freeze": {"text": {"unfreeze_at": "200%"}}}, "freeze.text.unfreeze_at 200% is no part"),
    ],
)
def test_what_the_config_alone_tells(changes, told):
    with pytest.raises(InputError, match=told):
        config_of(**changes)
