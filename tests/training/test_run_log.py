"""What a line of metrics.jsonl says, against what the step was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.training.run_log import LineLog
from tests.launcher import run, succeed
from tests.small_world import lines, make_world, metrics

FIELDS = {
    "step", "samples_seen", "loss", "grad_norm", "lr", "logit_scale", "logit_bias",
    "samples_per_second", "step_seconds", "data_seconds", "checkpoint_seconds", "memory_bytes",
    "bad_samples",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cosine(config) -> Path:
    """A run of 6 steps with a line each, InfoNCE, a cosine."""
    succeed("train", config)
    return config.parent / "run"


@pytest.fixture(scope="module")
def sigmoid(config) -> Path:
    """A run of 7 steps with a line every 3, on two processes, sigmoid, wsd."""
    folder = config.parent / "sigmoid"
    overrides = ["loss.kind=sigmoid", "train.steps=7", "log.every=3", "schedule.kind=wsd",
                 "schedule.cooldown=4", "schedule.min_lr=1e-4"]  # fmt: skip
    succeed("train", config, f"run_dir={folder}", *overrides, processes=2)
    return folder


def parameter(run: Path, step: int, name: str) -> float:
    return PieceReader(run / f"checkpoints/step_{step:08d}").read(f"weight:{name}").item()


def test_there_is_a_line_for_step_1_and_every_so_many(cosine, sigmoid):
    assert [line["step"] for line in metrics(cosine)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics(sigmoid)] == [1, 3, 6]


def test_every_field_is_there(cosine, sigmoid):
    for line in metrics(cosine) + metrics(sigmoid):
        assert line.keys() >= FIELDS
        assert line["samples_seen"] == 8 * line["step"]
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        assert line["bad_samples"] == 0


def test_the_learning_rate_is_the_one_of_the_update(cosine, sigmoid):
    cosines = [(1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)]  # after 2 steps of warmup
    rates = [1e-3 * share for share in (0.5, 1.0, *cosines)]
    assert [line["lr"] for line in metrics(cosine)] == pytest.approx(rates)
    falling = 1e-4 + 9e-4 * 2 / 4  # step 6 of 7 is the third of the last 4
    assert [line["lr"] for line in metrics(sigmoid)] == pytest.approx([5e-4, 1e-3, falling])


def test_the_scale_is_the_multiplier_that_the_step_used(cosine, sigmoid):
    scales = [line["logit_scale"] for line in metrics(cosine)]
    assert scales[0] == pytest.approx(1 / 0.07)
    after_2_and_4 = [math.exp(parameter(cosine, step, "logit_scale")) for step in (2, 4)]
    assert [scales[2], scales[4]] == pytest.approx(after_2_and_4)
    assert metrics(sigmoid)[0]["logit_scale"] == pytest.approx(10)


def test_the_bias_is_there_with_the_sigmoid_loss_alone(cosine, sigmoid):
    assert {line["logit_bias"] for line in metrics(cosine)} == {None}
    biases = [line["logit_bias"] for line in metrics(sigmoid)]
    assert biases[0] == -10
    assert biases[1] == pytest.approx(parameter(sigmoid, 2, "logit_bias"))


def test_speed_and_memory_are_possible(cosine, sigmoid):
    for line in metrics(cosine) + metrics(sigmoid):
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(8)
        assert 0 <= line["data_seconds"] <= line["step_seconds"]
        # Resident, in bytes: more than torch alone takes, less than any machine has.
        assert 2**27 < line["memory_bytes"] < 2**40


def test_clipping_does_not_show_in_the_norm(config, cosine, tmp_path):
    folder = tmp_path / "run"
    succeed("train", config, f"run_dir={folder}", "train.steps=2", "optimizer.clip_grad_norm=1e-3",
            "schedule.kind=constant")  # fmt: skip
    assert metrics(folder)[0]["grad_norm"] == metrics(cosine)[0]["grad_norm"]


# Squares of such weights are infinite on every processor.
WILD = ("optimizer.lr=1.0e+25", "schedule.warmup=0", "schedule.kind=constant")


def test_the_scale_is_kept_between_1_and_100(config, tmp_path):
    folder = tmp_path / "run"
    succeed("train", config, f"run_dir={folder}", "train.steps=1", *WILD)
    assert parameter(folder, 1, "logit_scale") in (0, pytest.approx(math.log(100)))


def test_a_run_that_breaks_says_where(config, tmp_path):
    (ended,) = run("train", config, f"run_dir={tmp_path / 'run'}", "train.steps=3", *WILD)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert ended.err.startswith("parallel-clip: step 2: the ") and " nan" in ended.err


def test_lines_that_cannot_be_written_are_caught_up(tmp_path, capsys):
    log = LineLog(tmp_path / "folder" / "metrics.jsonl")
    log.write({"step": 1})
    log.write({"step": 2})
    assert capsys.readouterr().out.count("is caught up later") == 1
    (tmp_path / "folder").mkdir()
    log.write({"step": 3})
    log.write({"step": 4})
    assert [line["step"] for line in lines(tmp_path / "folder" / "metrics.jsonl")] == [1, 2, 3, 4]
