"""Runs of several phases: gone on with from anywhere, with the same bits."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.launcher import Running, run, start, succeed
from tests.small_world import ledger, lines, make_world, metrics, state_of, status, tensors

STEPS = 6
PHASES = [
    {"until": "50%", "resolution": 16, "patch_dropout": 0.5},
    {"resolution": [40, 24], "lr": 5e-4},
]
FREEZE = {"text": {"unlocked_groups": 1, "unfreeze_at": 4 * 8}}  # the second of three models ends


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config of three models: small, large, and large with its text tower thawed."""
    folder = tmp_path_factory.mktemp("world")
    config = yaml.safe_load(make_world(folder).read_text())
    config |= {"phases": PHASES, "freeze": FREEZE, "precision": "bf16"}
    config["checkpoint"] = {"every": 1, "keep": None}
    config["evaluate"] = {"every": 3, "loss": config["data"]["train"][0]["shards"], "batch": 20}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """A run that nothing interrupted."""
    finish(start("train", world / "config.yaml", f"run_dir={world}/whole", before=refuse_two))
    return world / "whole"


def refuse_two(rank: int) -> None:
    """A model that is built while one before it still takes memory ends the process."""
    from parallel_clip.model.clip import CLIPModel
    from parallel_clip.training import train

    build = train.build_planned_state

    def build_alone(*arguments):
        held = [found for found in gc.get_objects() if isinstance(found, CLIPModel)]
        assert not held, held
        return build(*arguments)

    train.build_planned_state = build_alone


def fail_between_models(rank: int) -> None:
    from parallel_clip.training import train

    def fail(plan, groups):
        raise RuntimeError("out of memory, say")

    train.reached_resume_point = fail


def stop_between_models(rank: int) -> None:
    from parallel_clip.training import train

    reached = train.reached_resume_point

    def stop(plan, groups):
        os.kill(os.getpid(), signal.SIGTERM)
        return reached(plan, groups)

    train.reached_resume_point = stop


def finish(running: Running) -> None:
    for ended in running.wait():
        assert ended.code == 0, ended


def cut_back(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed behind the checkpoint of `step`, before the
    evaluation there."""
    shutil.copytree(whole, folder)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step_{later:08d}")
    (folder / "checkpoints/latest").write_text(f"step_{step:08d}\n")
    kept = [line for line in lines(folder / "evaluations.jsonl") if line["step"] < step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (folder / "evaluations.jsonl").write_text(text)
    return folder


def numbers(folder: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"]) for m in metrics(folder)]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_goes_on_from_anywhere_with_the_same_bits(world, whole, tmp_path, step):
    """Inside the first phase, at the boundary before its evaluation, and inside the last."""
    folder = cut_back(whole, tmp_path / "run", step)
    said = succeed("train", world / "config.yaml", f"run_dir={folder}")
    assert f"(step {step})" in said
    last = f"checkpoints/step_{STEPS:08d}"
    assert tensors(folder / last) == tensors(whole / last)
    assert numbers(folder) == numbers(whole) and ledger(folder) == ledger(whole)
    assert lines(folder / "evaluations.jsonl") == lines(whole / "evaluations.jsonl")


def test_a_run_goes_on_in_another_layout(world, whole, tmp_path):
    folder = cut_back(whole, tmp_path / "run", 2)
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    succeed("train", world / "config.yaml", f"run_dir={folder}", *layout, processes=2)
    for ours, theirs in zip(metrics(folder), metrics(whole), strict=True):
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02), "bf16 rounds otherwise"


@pytest.mark.parametrize(
    ("before", "code", "state", "reason"),
    [
        (stop_between_models, 0, "stopped", "signal:SIGTERM"),
        (fail_between_models, 1, "failed", "error: out of memory, say"),
    ],
)
def test_what_ends_a_run_between_two_models(world, whole, tmp_path, before, code, state, reason):
    command = "train", world / "config.yaml", f"run_dir={tmp_path / 'run'}"
    (ended,) = start(*command, before=before).wait()
    found = status(tmp_path / "run")
    assert (ended.code, found["state"], found["step"], found["reason"]) == (code, state, 3, reason)
    succeed(*command)
    last = f"checkpoints/step_{STEPS:08d}"
    assert tensors(tmp_path / "run" / last) == tensors(whole / last)
    assert lines(tmp_path / "run/evaluations.jsonl") == lines(whole / "evaluations.jsonl")


def test_checkpoints_are_of_the_phase_that_wrote_them(whole):
    sizes = []
    for step in range(1, STEPS + 1):
        meta = json.loads((whole / f"checkpoints/step_{step:08d}/meta.json").read_text())
        vision = meta["model"]["vision_cfg"]
        sizes.append(vision["image_size"])
        assert meta["preprocess"]["size"] == vision["image_size"]
        assert meta["run_model"]["vision_cfg"]["image_size"] == 32
        assert bool(meta["frozen"]) == (step <= 4)
        assert bool(meta["trained_since"]) == (step > 4)
    assert sizes == [16] * 3 + [[40, 24]] * 3


def test_phases_may_not_change_on_the_way_unless_allowed(world, whole, tmp_path):
    folder = cut_back(whole, tmp_path / "run", 5)
    before = state_of(folder)
    command = "train", world / "config.yaml", f"run_dir={folder}", "phases.1.resolution=48"
    (refused,) = run(*command)
    assert refused.code == 2 and "phases.1.resolution" in refused.err
    assert state_of(folder) == before
    said = succeed(*command, "resume.allow=[phases]")
    assert "48 x 48" in said and metrics(folder)[-1]["step"] == STEPS
