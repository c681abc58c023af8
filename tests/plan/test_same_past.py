"""Whether a run may go on with other sources in the phases that are still to come."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.errors import InputError
from parallel_clip.plan.resume import ResumePoint
from parallel_clip.plan.same_samples import require_same_past

A, B, C = ({"shards": f"{name}.tar"} for name in "abc")
POSITION = 50
BEGUN = [{"until": 40}, {"until": "80%", "sources": [B]}, {"sources": [C]}]


def config_of(phases, train=(A,), steps=10):
    return config_from_dict(
        {
            "train": {"steps": steps},
            "batch": {"global": 10, "micro": 5},
            "data": {"train": list(train)},
            "phases": list(phases),
        }
    )


def kept(before, now, accepted=("phases: ...",), position=POSITION) -> set[int]:
    meta = SimpleNamespace(config=before.to_tree(), position=position, step=position // 10)
    return set(require_same_past(ResumePoint(Path("run/step_5"), meta, None, accepted), now))


def changed(number: int, **changes):
    phases = [dict(phase) for phase in BEGUN]
    phases[number] |= changes
    return phases


def test_a_run_that_has_not_changed_keeps_all_sources():
    begun = config_of(BEGUN)
    assert kept(begun, begun, ()) == {0, 1, 2}
    assert set(require_same_past(ResumePoint(), begun)) == {0, 1, 2}
    conversion = ResumePoint(Path("run/step_5"), SimpleNamespace(config=None, position=POSITION))
    assert set(require_same_past(conversion, begun)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("phases", "sources"),
    [
        (changed(1, until="90%"), {0, 1, 2}),  # it goes on
        (changed(1, until=50), {0, 1, 2}),  # it ends here
        (changed(1, lr=0.1), {0, 1, 2}),
        (changed(2, sources=[A]), {0, 1}),
        (changed(1, sources=[C]), {0, 1}),  # a path alone: what is there is compared
        (changed(2, sources=[C | {"weight": 2.0}, B]), {0, 1}),
        (BEGUN[:1] + [{"sources": [B]}], {0, 1}),
        ([{"until": 20}, {"until": 40, "lr": 0.1}, {"sources": [B]}], {0, 1}),
    ],
)
def test_phases_that_are_still_to_come_may_change(phases, sources):
    assert kept(config_of(BEGUN), config_of(phases)) == sources


@pytest.mark.parametrize(
    "phases",
    [
        changed(0, until=30),
        changed(0, until=50),
        [{"until": 40, "sources": [A | {"weight": 2.0}]}, BEGUN[1], {}],
        changed(1, sources=[B, A]),
        changed(1, sources=[B | {"samples": 5}]),
        changed(1, sources=[B | {"caption_key": "alt"}]),
        [],
    ],
)
def test_what_has_been_seen_is_not_changed(phases):
    with pytest.raises(InputError, match="has seen 50 pairs, which with these phases .* init.from"):
        kept(config_of(BEGUN), config_of(phases))


def test_a_share_that_moves_with_the_length_is_seen():
    begun = [{"until": "40%"}, {"sources": [B]}]
    with pytest.raises(InputError, match="has seen 50 pairs"):
        kept(config_of(begun), config_of(begun, steps=20), ("train.steps: 10 → 20",))
    assert kept(config_of(begun), config_of(begun, steps=20), position=30) == {0, 1}


def test_a_run_may_be_given_an_end_on_other_sources():
    assert kept(config_of([]), config_of([{"until": "90%"}, {"sources": [C]}])) == {0}
    with pytest.raises(InputError, match="has seen 50 pairs"):
        kept(config_of([]), config_of([{"until": "40%"}, {"sources": [C]}]))


def test_a_folder_that_was_moved_is_named_alike_everywhere():
    begun = [{"until": 70}, {"sources": [A | {"weight": 2.0}]}]
    moved = {"shards": "moved/a.tar"}
    both = [{"until": 70}, {"sources": [moved | {"weight": 2.0}]}]
    assert kept(config_of(begun), config_of(both, [moved]), ()) == {0}
    with pytest.raises(InputError, match="name it alike in data.train and phases"):
        kept(config_of(begun), config_of(begun, [moved]), ())
