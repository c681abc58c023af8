"""Runs that average their weights, by the commands: evaluated, converted, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.pieces import PieceReader
from tests.data.shard_files import sample, write_shard
from tests.launcher import run, succeed
from tests.small_world import lines, make_world, metrics, state_of, tensors

EMA = ["ema.decay=0.8", "ema.every=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder)
    write_shard(folder / "held_out.tar", {f"{n:03d}": dict(sample(n)) for n in range(20)})
    return path


@pytest.fixture(scope="module")
def trained(config) -> Path:
    """A bf16 run of two data ranks, evaluated on its averages after steps 3 and 6."""
    data = config.parent / "held_out.tar"
    evaluate = ["evaluate.every=3", "evaluate.ema=true", "evaluate.batch=8"]
    evaluate += [f"evaluate.loss={data}", f"evaluate.retrieval={data}"]
    said = succeed("train", config, *EMA, *evaluate, "precision=bf16", processes=2)
    assert "averages of the weights: decay 0.8, after every 2 updates" in said
    assert "held out at step 3 of the averages" in said
    return config.parent / "run"


def averages_of(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = PieceReader(commit.latest(run_dir))
    keys = [key for key in reader.keys() if key.startswith("ema:")]
    return {key.removeprefix("ema:"): reader.read(key) for key in keys}


def test_their_evaluation_leaves_training_as_it_was(trained, config, tmp_path):
    succeed("train", config, *EMA, "precision=bf16", f"run_dir={tmp_path}/run", processes=2)
    assert tensors(commit.latest(tmp_path / "run")) == tensors(commit.latest(trained))
    losses = [[line["loss"] for line in metrics(r)] for r in (tmp_path / "run", trained)]
    assert losses[0] == losses[1]


def test_the_figures_in_training_are_those_of_evaluate_ema(trained, config):
    kept = lines(trained / "evaluations.jsonl")
    assert [(line["step"], line["ema"]) for line in kept] == [(3, True), (6, True)]
    data = ["--data", config.parent / "held_out.tar", "--json", "-", "--precision", "bf16"]
    found = json.loads(succeed("evaluate", "retrieval", trained, *data, "--ema"))
    assert kept[-1]["retrieval"] == pytest.approx(found)


def test_open_clip_loads_the_averages(trained, tmp_path):
    succeed("convert", trained, tmp_path / "out", "--to", "openclip", "--ema")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/out")
    averages = averages_of(trained)
    state = model.state_dict()
    assert averages.keys() == state.keys() - {"attn_mask"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in averages.items())


LONGER = ["schedule.kind=constant", "schedule.warmup=0", "train.steps=3"]


def test_a_run_without_averages_gets_some_only_where_it_is_allowed(config, tmp_path):
    folder = tmp_path / "run"
    words = ["train", config, f"run_dir={folder}", *LONGER, "checkpoint.every=0"]
    succeed(*words)
    before = state_of(folder)
    words += ["ema.decay=0.9", "train.steps=4"]
    (ended,) = run(*words)
    assert ended.code == 2 and "ema.decay: null → 0.9" in ended.err
    assert state_of(folder) == before
    said = succeed(*words, "resume.allow=[ema]")
    assert "step_00000003 has no averages of weights: they start from its weights" in said
    after = PieceReader(commit.latest(folder))
    start = PieceReader(folder / "checkpoints/step_00000003")
    for key in (key for key in start.keys() if key.startswith("weight:")):
        expected = 0.9 * start.read(key) + 0.1 * after.read(key)
        found = after.read(key.replace("weight:", "ema:"))
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8), key
    assert json.loads((folder / "resumes.jsonl").read_text())["changed"] == [
        "ema.decay: null → 0.9"
    ]
    # And without them again.
    words.remove("ema.decay=0.9")
    (ended,) = run(*words, "train.steps=5")
    assert ended.code == 2 and "ema.decay: 0.9 → null" in ended.err
    succeed(*words, "train.steps=5", "resume.allow=[ema.decay]")
    assert not averages_of(folder)


def test_a_conversion_is_resumed_with_averages_only_where_it_is_allowed(trained, config, tmp_path):
    folder = tmp_path / "run"
    succeed("convert", trained, folder, "--to", "run", "--ema")
    words = ["train", config, f"run_dir={folder}", "train.steps=1", *EMA]
    (ended,) = run(*words)
    assert ended.code == 2 and "no averages of weights for ema.decay 0.8" in ended.err
    assert [f.name for f in folder.iterdir()] == ["checkpoints"]
    said = succeed(*words, "resume.allow=[ema]")
    assert "step_00000000 has no averages of weights: they start from its weights" in said
    # `every` is 2: after one step they are still the weights that the run began with.
    start, found = averages_of(trained), averages_of(folder)
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_checkpoint_show_and_verify_know_them(trained):
    shown = json.loads(succeed("checkpoint", "show", trained, "--json", "-"))
    assert shown["has_averages"] is True
    found = json.loads(succeed("checkpoint", "verify", trained, "--json", "-"))
    assert [entry["verified"] for entry in found] == [True] * 3
