"""The plan of a run of phases: its models, partitions and memory, and what does not fit."""

from __future__ import annotations

import pickle

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan import memory_of_run, segment_plan
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.phase_models import phase_models
from parallel_clip.plan.report import dry_run_report
from parallel_clip.plan.run_plan import make_run_plan
from tests.data.shard_files import write_shards
from tests.plan.small_plans import EVEN, small_config, step_holding
from tests.small_models import KINDS, small_model


def phased(config, phases, steps=10):
    tree = config.to_tree() | {"phases": phases, "train": {"steps": steps}}
    return config_from_dict(tree)


def models_of(name: str, *phases):
    tree = {"train": {"steps": 9}, "data": {"train": [{"shards": "a"}]}, "phases": list(phases)}
    return phase_models(config_from_dict(tree), load_architecture(name))


def test_what_a_phase_does_not_say_is_the_models():
    small, own, large = models_of(
        "ViT-L-14",
        {"until": "10%", "resolution": 112, "patch_dropout": 0.5},
        {"until": "20%"},
        {"resolution": 336},
    )
    assert (small.vision.image_size, small.vision.patch_dropout) == ((112, 112), 0.5)
    assert small.name == own.name == "ViT-L-14" and own == load_architecture("ViT-L-14")
    assert large == load_architecture("ViT-L-14-336") and large.name == "ViT-L-14-336"


@pytest.mark.parametrize(
    ("name", "phase", "told"),
    [
        ("ViT-L-14", {"resolution": 120}, r"phases.0.resolution 120 is no whole .* 112 x 112 and "),
        ("ViT-L-14", {"resolution": 7}, r"phases.0.resolution 7: .*a picture has no whole patch"),
        ("PE-Core-L-14-336", {"patch_dropout": 0.5}, "phases.0.patch_dropout 0.5: .*rotary"),
    ],
)
def test_what_no_model_can_do(name, phase, told):
    with pytest.raises(InputError, match=told):
        models_of(name, phase)


def test_the_models_own_size_may_leave_a_rest():
    name = "ViT-SO400M-14-SigLIP-384"
    first, _ = models_of(name, {"until": "50%", "resolution": 224}, {"resolution": 384})
    assert first.vision.grid == (16, 16)


def test_each_model_of_a_run_is_planned_and_a_learning_rate_makes_no_new_one(tmp_path):
    phases = [
        {"until": "40%", "resolution": 8, "lr": 0.1},
        {"until": "60%"},
        {"until": "80%", "lr": 0.2},
        {"resolution": [32, 32], "patch_dropout": 0.0, "lr": 0.3},
    ]
    small = small_model({"layers": 5}, {"layers": 3, "vocab_size": 49408})
    config = phased(small_config(tmp_path, 2, pipeline=2, model=small), phases)
    plan, _ = make_run_plan(config, 2)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.architecture.vision.image_size == (8, 8) == plan.preprocess.image_size
    assert plan.stop == 4 and plan.model == architecture_from_json(small, "x")
    assert [plan.peak_at(step) for step in (0, 3, 4, 6, 8, 9)] == [0.1, 0.1, 5e-4, 0.2, 0.3, 0.3]
    assert [each.layout_plan is plan.segments[1].layout_plan for each in plan.segments] == [
        False, True, True, True,
    ]  # fmt: skip
    first, second = (each.layout_plan.stages for each in plan.segments[:2])
    assert [s.vision.layers for s in first] != [s.vision.layers for s in second], "by cost"

    report = dry_run_report(config, 2)
    assert "below: steps 5 to 6, the fullest" in report
    rows = [line.split() for line in report.splitlines() if line.startswith("  3 ")]
    assert rows[0][:7] == ["3", "9", "to", "10", "32", "x", "32"]


def test_other_sources_make_no_new_model_and_are_told(tmp_path):
    write_shards(tmp_path / "clean", [3, 2])
    clean = {"shards": str(tmp_path / "clean"), "weight": 2.0}
    phases = [{"until": "40%"}, {"until": "60%", "sources": [clean]}, {}]
    plan, _ = make_run_plan(phased(small_config(tmp_path, 1), phases), 1)
    assert plan.stop == 10 and plan.stretches == ((0, 0, 0), (8, 1, 0), (12, 0, 8))
    assert [blend.pairs for blend in plan.blends] == [(2, 0), (0, 10)]
    assert [plan.epochs_by(position) for position in (0, 2, 8, 12, 14, 20)] == [0, 1, 4, 4, 5, 8]

    report = dry_run_report(plan.config, 1).splitlines()
    rows = [line.split() for line in report]
    head = next(row for row in rows if row[:2] == ["phase", "steps"])
    assert head[-2:] == ["sources", "GiB"]
    of_phases = rows[rows.index(head) + 2 :][:3]
    assert [(row[0], row[3], row[-2]) for row in of_phases] == [
        ("0", "4", "0"), ("1", "6", "1"), ("2", "10", "0"),
    ]  # fmt: skip
    assert "  source 0: 1 shards, 2 samples, weight 1: 2 pairs an epoch" in report
    assert "  an epoch: 2 pairs; 8 epochs of phases 0 and 2" in report
    assert "  source 1: 2 shards, 5 samples, weight 2: 10 pairs an epoch" in report
    assert "  an epoch: 10 pairs; 0.4 epochs of phase 1" in report
    assert sum("reading" in line and "of phase" in line for line in report) == 2


def test_a_layout_that_does_not_fit_one_of_the_phases_is_told_with_it(tmp_path, monkeypatch):
    def count(config, architecture, plan, *_, **__):
        saved = 10**6 * architecture.vision.training_tokens
        held = RankMemory(0, 0, 0, 0, 0, ({"layers": saved},))
        return step_holding(plan, [held])

    monkeypatch.setattr(memory_of_run, "predict_step_memory", count)
    monkeypatch.setattr(segment_plan, "shortage_words", lambda shortage: f"too much: {shortage}")
    phases = [{"until": "50%", "resolution": 8}, {"resolution": 32}]
    stashes = {}
    for memory in ("80MB", "20MB", "10MB"):  # of 3 times 2 and 17 MB, and the loss
        config = phased(small_config(tmp_path, 3, model=EVEN, memory=memory), phases)
        if memory != "10MB":
            plan, _ = make_run_plan(config, 1)
            stashes[memory] = [each.layout_plan.stash for each in plan.segments]
            continue
        with pytest.raises(InputError, match=r"^phases.1: too much: .*vision=.*others="):
            make_run_plan(config, 1)
    assert stashes == {"80MB": [3, 3], "20MB": [3, 0]}


def test_a_trunk_of_timm_has_phases_too(tmp_path):
    name = "timm-mobile-clip"
    kind = KINDS[name] | {"text_cfg": KINDS[name]["text_cfg"] | {"vocab_size": 49408}}
    config = phased(
        small_config(tmp_path, 1, model=kind), [{"until": 10, "patch_dropout": 0.5}, {}]
    )
    assert make_run_plan(config, 1)[0].architecture.vision.patch_dropout == 0.5
