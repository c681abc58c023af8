"""What a run does when something breaks: it ends in time, says why, and goes on afterwards as if
nothing had happened, to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.manifest import Manifest
from tests import faults
from tests.faults import fault
from tests.launcher import Ended, run, start, succeed
from tests.small_world import ledger, lines, make_world, metrics, status, tensors

STEPS, EVERY = 6, 2
TIMES = {"samples_per_second", "step_seconds", "data_seconds", "checkpoint_seconds", "memory_bytes"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(config) -> Callable[[str], Path]:
    """The run that nobody disturbed in a layout."""

    @cache
    def run_of(layout: str) -> Path:
        run_dir = config.parent / layout
        succeed("train", config, layout, f"run_dir={run_dir}", processes=2)
        return run_dir

    return run_of


def values(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run_dir)]


def last_checkpoint(run_dir: Path) -> Path:
    folder = commit.latest(run_dir)
    Manifest.read(folder).verify(folder)
    return folder


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Losses, samples, weights and moments to the bit, and nothing left behind."""
    assert values(run_dir) == values(other)
    assert ledger(run_dir) == ledger(other)
    assert tensors(last_checkpoint(run_dir)) == tensors(last_checkpoint(other))
    assert status(run_dir)["state"] == "finished"
    assert not list((run_dir / "checkpoints").glob(".*")) and not (run_dir / "lease").exists()


def disturbed(
    config: Path, run_dir: Path, layout: str, *before: faults.Fault, args: tuple = ()
) -> list[Ended]:
    """Run with a fault until all ranks have ended; that takes no minute."""
    words = ("train", config, layout, f"run_dir={run_dir}", *args)
    return start(*words, processes=2, before=before[0]).wait(60)


def some(names, *always: str) -> list:
    """All of `names` as parameters, those but `always` with the mark of the long suite."""
    return [
        name if name in always else pytest.param(name, marks=pytest.mark.long) for name in names
    ]


# ------------------------------------------------------------------------------------------ kills

LAYOUTS = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"]
KILLS = {
    # name: layout, point, its call, rank
    "in data, rank 0": (LAYOUTS[2], "data", 4, 0),
    "in forward, rank 1": (LAYOUTS[0], "forward", 4, 1),
    "in backward, rank 1": (LAYOUTS[1], "backward", 3, 1),
    "in the optimizer, rank 0": (LAYOUTS[0], "update", 5, 0),
    "in a save, rank 1": (LAYOUTS[2], "write", 2, 1),
    "in a commit, rank 0": (LAYOUTS[1], "rename", 2, 0),
}


@pytest.mark.parametrize("name", some(KILLS, "in backward, rank 1", "in a save, rank 1"))
def test_after_a_kill_a_run_goes_on_to_the_same_bits(config, undisturbed, tmp_path, name):
    layout, point, call, rank = KILLS[name]
    run_dir = tmp_path / "run"
    began = time.monotonic()
    ended = disturbed(config, run_dir, layout, fault(point, call, rank, faults.kill))
    assert time.monotonic() - began < 60
    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code == 1
    assert "Traceback" not in ended[1 - rank].err
    assert "connection to another rank was closed" in ended[1 - rank].err
    assert status(run_dir)["state"] in ("running", "failed")
    succeed("train", config, layout, f"run_dir={run_dir}", processes=2)
    assert_same_run(run_dir, undisturbed(layout))


# ---------------------------------------------------------------------------------- stop requests

STOPS = {
    # name: rank, point, call, action, reason, step
    "SIGTERM to rank 0": (0, "forward", 4, faults.terminate, "signal:SIGTERM", 4),
    "SIGUSR1 to rank 1": (1, "forward", 3, faults.user_signal, "signal:SIGUSR1", 3),
    "SIGINT in the first step": (1, "backward", 1, faults.interrupt, "signal:SIGINT", 1),
    "SIGTERM twice in a save": (1, "write", 1, faults.terminate_twice, "signal:SIGTERM", 2),
    "SIGTERM during start-up": (0, "start", 1, faults.terminate, "signal:SIGTERM", 0),
}


@pytest.mark.parametrize("name", some(STOPS, "SIGUSR1 to rank 1", "SIGTERM during start-up"))
def test_a_request_to_stop_saves_once_and_says_so(config, undisturbed, tmp_path, name):
    rank, point, call, action, reason, step = STOPS[name]
    run_dir, layout = tmp_path / "run", LAYOUTS[0]
    ended = disturbed(config, run_dir, layout, fault(point, call, rank, action))
    assert [one.code for one in ended] == [0, 0], ended
    assert status(run_dir) | {"time": None} == {
        "state": "stopped", "step": step, "reason": reason, "time": None,
    }  # fmt: skip
    assert last_checkpoint(run_dir).name == f"step_{step:08d}"
    assert f"stopped after step {step} of {STEPS} ({reason}), saved" in ended[0].out
    assert not (run_dir / "lease").exists()
    succeed("train", config, layout, f"run_dir={run_dir}", processes=2)
    assert_same_run(run_dir, undisturbed(layout))


def test_an_evaluation_is_left_and_done_again(config, tmp_path):
    """Of 10 batches each: with two stages a request is known of at the third after it. Evaluated
    are the averages, which leave their place to the weights."""
    shards = yaml.safe_load(config.read_text())["data"]["train"][0]["shards"]
    layout = "parallel.pipeline=2"
    args = ("evaluate.every=4", "evaluate.batch=4", f"evaluate.loss={shards}")
    args += ("ema.decay=0.9", "evaluate.ema=true")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    succeed("train", config, layout, *args, f"run_dir={whole}", processes=2)
    for rank, call, step in ((1, 3, 4), (0, 13, 6)):  # the second after an evaluation of step 4
        stop = fault("evaluate", call, rank, faults.terminate)
        ended = disturbed(config, run_dir, layout, stop, args=args)
        assert [one.code for one in ended] == [0, 0], ended
        assert f"stopped after step {step} of {STEPS} (signal:SIGTERM), saved" in ended[0].out
        assert f"held out at step {step}" not in ended[0].out
    out = succeed("train", config, layout, *args, f"run_dir={run_dir}", processes=2)
    assert "held out at step 6 of the averages" in out
    assert_same_run(run_dir, whole)
    assert lines(run_dir / "evaluations.jsonl") == lines(whole / "evaluations.jsonl")
    out = succeed("train", config, layout, *args, f"run_dir={run_dir}", processes=2)
    assert "is finished" in out


def test_the_time_limit_saves_and_ends_by_itself(config, undisturbed, tmp_path):
    run_dir, layout = tmp_path / "run", LAYOUTS[0]
    out = succeed(
        "train", config, layout, f"run_dir={run_dir}", "train.time_limit=0.01", processes=2
    )
    assert "stopped after step 0 of 6 (time_limit), saved" in out
    assert status(run_dir)["reason"] == "time_limit"
    succeed("train", config, layout, f"run_dir={run_dir}", processes=2)
    assert_same_run(run_dir, undisturbed(layout))


# ------------------------------------------------------------------------------------ failed saves


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("rank", "point", "asynchronous"),
    [
        (1, "write", "false"),
        (0, "rename", "true"),
        pytest.param(0, "write", "false", marks=LONG),
        pytest.param(0, "write", "true", marks=LONG),
        pytest.param(1, "write", "true", marks=LONG),
        pytest.param(0, "rename", "false", marks=LONG),
    ],
)
def test_a_full_disk_fails_the_save_everywhere(
    config, undisturbed, tmp_path, rank, point, asynchronous
):
    run_dir, layout = tmp_path / "run", LAYOUTS[2]
    # The second save: of rank 0 each has four files, and the status is written in the same way.
    call = 2
    action = faults.disk_full
    ended = start(
        "train", config, layout, f"run_dir={run_dir}", f"checkpoint.async={asynchronous}",
        processes=2, before=faults.fault_in_save(point, call, rank, action),
    ).wait(60)  # fmt: skip
    assert [one.code for one in ended] == [1, 1]
    assert ended[0].err.count("save of step 4 failed: No space left on device") == 1
    assert "the checkpoint of step 2 is whole" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err
    assert status(run_dir)["state"] == "failed"
    assert status(run_dir)["reason"].startswith("save_failed: save of step 4 failed")
    assert last_checkpoint(run_dir).name == "step_00000002"
    assert not list((run_dir / "checkpoints").glob(".unfinished*"))
    succeed("train", config, layout, f"run_dir={run_dir}", processes=2)
    assert_same_run(run_dir, undisturbed(layout))


def test_training_goes_on_over_allowed_failures(config, undisturbed, tmp_path):
    run_dir, layout = tmp_path / "run", LAYOUTS[2]
    ended = start(
        "train", config, layout, f"run_dir={run_dir}", "checkpoint.failures=1",
        processes=2, before=faults.fault_in_save("write", 2, 1, faults.io_error),
    ).wait(60)  # fmt: skip
    assert [one.code for one in ended] == [0, 0]
    assert "training goes on (failed save 1 of 1)" in ended[0].out
    assert [f.name for f in commit.step_folders(run_dir)] == ["step_00000002", "step_00000006"]
    assert_same_run(run_dir, undisturbed(layout))


def test_an_asynchronous_run_has_the_bits_of_a_synchronous_one(config, undisturbed, tmp_path):
    run_dir, layout = tmp_path / "run", LAYOUTS[1]
    succeed("train", config, layout, f"run_dir={run_dir}", "checkpoint.async=true", processes=2)
    assert len(commit.step_folders(run_dir)) == STEPS // EVERY
    assert_same_run(run_dir, undisturbed(layout))


# --------------------------------------------------------------------------------------- bad steps

SPOILT = {
    # name: layout, rank whose gradient is spoilt
    "tensor rank": (LAYOUTS[0], 1),
    "pipeline rank": (LAYOUTS[1], 0),
    "data rank": (LAYOUTS[2], 1),
}


@pytest.mark.parametrize("name", some(SPOILT, "data rank"))
def test_a_bad_gradient_on_one_rank_ends_the_run_on_all(config, tmp_path, name):
    layout, rank = SPOILT[name]
    run_dir = tmp_path / "run"
    ended = disturbed(config, run_dir, layout, fault("clip", 4, rank, faults.spoil_gradient))
    assert [one.code for one in ended] == [1, 1]
    assert "step 4: the gradient norm is nan" in ended[0].err
    assert "Traceback" not in ended[0].err + ended[1].err
    assert status(run_dir)["reason"].startswith("bad_steps: step 4")
    assert last_checkpoint(run_dir).name == "step_00000002"


@pytest.mark.parametrize("name", some(SPOILT, "tensor rank"))
def test_a_skipped_step_changes_nothing(config, tmp_path, name):
    layout, rank = SPOILT[name]
    run_dir = tmp_path / "run"
    ended = disturbed(
        config, run_dir, layout, fault("clip", 2, rank, faults.spoil_gradient),
        args=("bad_steps.action=skip", "train.steps=2", "checkpoint.every=1", "ema.decay=0.9"),
    )  # fmt: skip
    assert [one.code for one in ended] == [0, 0], ended
    first, second = values(run_dir)
    assert second["skipped"] is True and second["grad_norm"] is None and "skipped" not in first
    assert second["samples_seen"] == 16
    before, after = commit.step_folders(run_dir)
    assert tensors(before) == tensors(after)
    meta = json.loads((after / "meta.json").read_text())
    assert meta["updates"] == 1 and meta["skipped"] == [2] and meta["position"] == 16
    skipped = lines(run_dir / "skipped_samples.jsonl")
    assert sorted(sample["position"] for sample in skipped) == list(range(8, 16))
    assert {sample["step"] for sample in skipped} == {2}


def test_too_many_bad_steps_end_the_run(config, tmp_path):
    run_dir, layout = tmp_path / "run", LAYOUTS[2]
    spoil = faults.spoil_gradient
    ended = disturbed(
        config, run_dir, layout, fault("clip", 2, 1, spoil, fault("clip", 3, 0, spoil)),
        args=("bad_steps.action=skip", "bad_steps.limit=1"),
    )  # fmt: skip
    assert [one.code for one in ended] == [1, 1]
    assert "this is bad step 2 of the last 100, and bad_steps.limit is 1" in ended[0].err


# ------------------------------------------------------------------------------------------ stalls

STALLS = {
    # name: layout, rank, action, what names it
    "a stopped rank": (LAYOUTS[2], 1, faults.stop_process, "rank 1 does not answer"),
    "a stopped rank 0": (LAYOUTS[0], 0, faults.stop_process, "rank 0, or the launcher"),
    "an endless sleep": (LAYOUTS[1], 1, faults.sleep_for_ever, "rank 1 on "),
}


@pytest.mark.parametrize("name", some(STALLS, "a stopped rank"))
def test_a_stalled_rank_is_named(config, tmp_path, name):
    layout, rank, action, named = STALLS[name]
    run_dir = tmp_path / "run"
    words = ("train", config, layout, f"run_dir={run_dir}", "watchdog.timeout=10")
    running = start(*words, processes=2, before=fault("forward", 3, rank, action))
    running.processes[1 - rank].join(60)
    if action is not faults.stop_process:
        running.processes[rank].join(10)
    running.kill()
    ended = running.wait(10)
    assert ended[1 - rank].code == 1
    err = ended[1 - rank].err + ended[rank].err
    assert "no progress for watchdog.timeout 10 s" in err and named in err, err
    assert status(run_dir)["reason"].startswith("watchdog: ")
    if name == "an endless sleep":
        assert "sleep_for_ever" in (run_dir / "stalled.txt").read_text()
        assert ended[rank].code == 1


# ------------------------------------------------------------------------------------------- lease


def test_a_second_job_on_the_folder_is_refused(config, tmp_path):
    run_dir = tmp_path / "run"
    words = ("train", config, f"run_dir={run_dir}")
    first = start(*words, before=fault("forward", 3, 0, faults.sleep_for_ever, faults.quick_lease))
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    before = (run_dir / "config.yaml").read_bytes()
    (second,) = run(*words)
    assert second.code == 2 and f"run_dir {run_dir} is in use: process " in second.err
    (third,) = run(*words, "--dry-run")
    assert third.code == 0
    assert (run_dir / "config.yaml").read_bytes() == before
    first.kill()
    first.wait()
    succeed(*words)  # a holder that is known to be gone is not waited for
    assert status(run_dir)["state"] == "finished"


def test_a_stale_writer_cannot_commit(config, tmp_path):
    """Its lease is taken over while it sleeps before the rename."""
    run_dir = tmp_path / "run"
    words = ("train", config, f"run_dir={run_dir}")
    stale = start(*words, before=fault("rename", 2, 0, faults.wait_for_takeover))
    deadline = time.monotonic() + 60
    while not list(run_dir.glob("checkpoints/.unfinished_step_00000004*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(run_dir / "lease")
    succeed(*words)
    whole = tensors(last_checkpoint(run_dir))
    (run_dir / "takeover").touch()
    (ended,) = stale.wait(60)
    assert ended.code == 1 and "save of step 4 failed" in ended.err
    assert "Traceback" not in ended.err
    assert tensors(last_checkpoint(run_dir)) == whole
    assert status(run_dir)["state"] == "finished"
