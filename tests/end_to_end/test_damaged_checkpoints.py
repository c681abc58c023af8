"""A damaged checkpoint is found before anything changes, by every command that reads one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.data.samples.tokenizer_folders import make_bert
from tests.launcher import run, succeed
from tests.small_world import make_world, metrics, state_of, tensors

FILES = ["index.json", "manifest.json", "meta.json", "vocab.txt", "rank_00000_000.safetensors"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """With a tokenizer whose files are in each checkpoint."""
    path = make_world(tmp_path_factory.mktemp("world"))
    config = yaml.safe_load(path.read_text())
    config["data"]["tokenizer"] = str(make_bert(path.parent / "bert"))
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def whole(config) -> Path:
    run_dir = config.parent / "whole"
    succeed("train", config, f"run_dir={run_dir}")
    return run_dir


@pytest.fixture
def damaged(whole, tmp_path) -> Path:
    """A run of which step 4 is the newest; to be damaged."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000006")
    (run_dir / "checkpoints/latest").write_text("step_00000004\n")
    return run_dir


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    file.write_bytes(data)


def refused(*words: object, processes: int = 1) -> str:
    first, *others = run(*words, processes=processes)
    assert first.code == 2 and all(other.code == 2 for other in others), (first, others)
    assert "Traceback" not in first.err and first.err.count("parallel-clip: ") == 1
    return first.err


@pytest.mark.parametrize("name", FILES)
def test_resuming_from_it_is_refused(config, damaged, name):
    flip_a_bit(damaged / "checkpoints/step_00000004" / name)
    before = state_of(damaged)
    message = refused("train", config, f"run_dir={damaged}", processes=2)
    assert name in message and "checkpoint.fallback=true" in message
    assert state_of(damaged) == before and not (damaged / "lease").exists()


@pytest.mark.parametrize(
    "name", ["rank_00000_000.safetensors", pytest.param("vocab.txt", marks=pytest.mark.long)]
)
def test_with_fallback_the_one_before_is_taken(config, whole, damaged, name):
    flip_a_bit(damaged / "checkpoints/step_00000004" / name)
    words = ("train", config, f"run_dir={damaged}", "checkpoint.fallback=true")
    out = succeed(*words, processes=2)
    assert f"{name}" in out and "checkpoint.fallback takes the one before" in out
    assert "step_00000002 (step 2)" in out
    assert [line["step"] for line in metrics(damaged)] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(metrics(damaged), metrics(whole), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert succeed("checkpoint", "verify", damaged).count("intact") == 3


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000_000.safetensors"])
def test_starting_from_it_is_refused(config, damaged, tmp_path, name):
    flip_a_bit(damaged / "checkpoints/step_00000004" / name)
    new = tmp_path / "new"
    message = refused("train", config, f"run_dir={new}", f"init.from={damaged}")
    assert name in message and not new.exists()


@pytest.mark.parametrize("name", ["index.json", "rank_00000_000.safetensors"])
def test_converting_it_is_refused(damaged, tmp_path, name):
    flip_a_bit(damaged / "checkpoints/step_00000004" / name)
    assert name in refused("convert", damaged, tmp_path / "out", "--to", "openclip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.long)])
def test_evaluating_it_is_refused(config, damaged, processes):
    flip_a_bit(damaged / "checkpoints/step_00000004/rank_00000_000.safetensors")
    words = ("evaluate", "retrieval", damaged, "--data", config.parent / "train")
    assert "rank_00000_000.safetensors" in refused(*words, processes=processes)


def test_the_commands_on_checkpoints(damaged):
    listed = json.loads(succeed("checkpoint", "list", damaged, "--json", "-"))
    assert [(c["step"], c["complete"], c["verified"]) for c in listed] == [
        (2, True, None), (4, True, None),
    ]  # fmt: skip
    assert listed[1]["layout"]["tensor"] == 1 and listed[1]["bytes"] > 1000 and listed[1]["latest"]
    assert json.loads(succeed("checkpoint", "show", damaged, "--json", "-"))["step"] == 4
    flip_a_bit(damaged / "checkpoints/step_00000002/rank_00000_000.safetensors")
    (ended,) = run("checkpoint", "verify", damaged, "--json", "-")
    assert ended.code == 2
    first, second = json.loads(ended.out)
    assert first["verified"] is False and "rank_00000_000.safetensors" in first["problem"]
    assert second["verified"] is True
    (ended,) = run("checkpoint", "verify", damaged)
    assert ended.code == 2 and "DAMAGED" in ended.out


def test_a_damaged_config_does_not_stop_a_run_that_has_a_checkpoint(config, whole, damaged):
    (damaged / "config.yaml").write_bytes(b"")
    succeed("train", config, f"run_dir={damaged}")
    assert tensors(damaged / "checkpoints/step_00000006") == tensors(
        whole / "checkpoints/step_00000006"
    )
    assert (damaged / "config.yaml").read_bytes() != b""


def test_a_damaged_config_without_a_checkpoint_is_named(config, damaged):
    shutil.rmtree(damaged / "checkpoints")
    (damaged / "config.yaml").write_bytes(b"{")
    message = refused("train", config, f"run_dir={damaged}")
    assert "config.yaml is damaged" in message and "remove the folder" in message


def test_another_precision_is_taken_where_it_is_allowed(config, damaged):
    words = ("train", config, f"run_dir={damaged}", "precision=bf16")
    assert 'precision: "fp32" → "bf16"' in refused(*words)
    succeed(*words, "resume.allow=[precision]", processes=2)
    assert [line["step"] for line in metrics(damaged)] == [1, 2, 3, 4, 5, 6]


def test_what_is_allowed_is_accepted_and_noted(config, damaged):
    changed = ("optimizer.lr=0.002", "resume.allow=[optimizer.lr]")
    succeed("train", config, f"run_dir={damaged}", *changed)
    (noted,) = [json.loads(line) for line in (damaged / "resumes.jsonl").read_text().splitlines()]
    assert noted["step"] == 4 and noted["changed"] == ["optimizer.lr: 0.001 → 0.002"]
