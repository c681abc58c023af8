"""A seeded random walk over kills, stops, damage, lost files and changes of layout, in one run. At
its end the run is what it would have been if nobody had disturbed it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.inspect import inspect_checkpoint
from tests import faults
from tests.faults import fault
from tests.launcher import start, succeed
from tests.small_world import ledger, make_world, metrics

STEPS = 60
LAYOUTS = [
    (1, "parallel.tensor=1"),
    (2, "parallel.tensor=2"),
    (2, "parallel.pipeline=2"),
    (2, "parallel.distributed_optimizer=false"),
]
POINTS = ["data", "forward", "backward", "clip", "update", "write", "rename"]
ACTIONS = [faults.kill, faults.kill, faults.terminate, faults.disk_full, faults.user_signal]
CODES = {
    faults.kill: {-9, 1},
    faults.disk_full: {0, 1, 2},
    faults.terminate: {0},
    faults.user_signal: {0},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    succeed("train", config, f"train.steps={STEPS}", f"run_dir={config.parent / 'whole'}")
    return config.parent / "whole"


def damage(walk: random.Random, run_dir: Path) -> str:
    """Damage what lies on the disk so that a run with `checkpoint.fallback` can still go on."""
    folders = commit.step_folders(run_dir)
    kind = walk.choice(["nothing", "flip", "prune", "no latest", "no config", "half a checkpoint"])
    if kind == "flip" and len(folders) > 1:
        newest = commit.latest(run_dir)
        file = walk.choice(sorted(newest.iterdir()))
        data = bytearray(file.read_bytes())
        data[walk.randrange(len(data))] ^= 1 << walk.randrange(8)
        file.write_bytes(data)
    elif kind == "prune" and len(folders) > 2:
        commit.prune(run_dir, keep=2)
    elif kind == "no latest" and folders:
        (run_dir / "checkpoints" / "latest").unlink()
    elif kind == "no config" and folders:
        (run_dir / "config.yaml").write_bytes(b"")
    elif kind == "half a checkpoint" and folders:
        commit.begin(run_dir, 10**6)
    return kind


def walk_on(walk: random.Random, config: Path, run_dir: Path) -> list[str]:
    """One start of the run with a fault in it; what was done, for the message of a failure."""
    processes, layout = walk.choice(LAYOUTS)
    point, action = walk.choice(POINTS), walk.choice(ACTIONS)
    if action is faults.disk_full:
        point = "write"
    call, rank = walk.randint(1, 10), walk.randrange(processes)
    words = [
        "train", config, f"run_dir={run_dir}", f"train.steps={STEPS}", layout,
        "checkpoint.fallback=true", f"checkpoint.async={walk.choice(['true', 'false'])}",
        f"checkpoint.every={walk.randint(1, 4)}", f"checkpoint.failures={walk.randint(0, 1)}",
    ]  # fmt: skip
    ended = start(
        *words, processes=processes, before=fault(point, call, rank, action)
    ).wait(90)  # fmt: skip
    done = [layout, point, str(call), str(rank), action.__name__, *map(str, words[5:])]
    codes = {one.code for one in ended}
    assert codes <= CODES[action] | {0}, (done, ended)
    for one in ended:
        assert "Traceback" not in one.err, (done, one.err)
    return done


@pytest.mark.parametrize(
    ("seed", "starts"),
    [(1, 5), *(pytest.param(seed, 30, marks=pytest.mark.long) for seed in range(2, 8))],
)
def test_a_walk_ends_as_an_undisturbed_run(config, undisturbed, tmp_path, seed, starts):
    walk, run_dir, done = random.Random(seed), tmp_path / "run", []
    for _ in range(starts):
        done.append(walk_on(walk, config, run_dir))
        whole = [inspect_checkpoint(f, verify=True) for f in commit.step_folders(run_dir)]
        assert all(state.verified for state in whole if "flip" not in done), (done, whole)
        done.append(damage(walk, run_dir))
        if len(metrics(run_dir)) == STEPS if (run_dir / "metrics.jsonl").exists() else False:
            break
    words = ("train", config, f"run_dir={run_dir}", f"train.steps={STEPS}")
    succeed(*words, "checkpoint.fallback=true")
    assert ledger(run_dir) == ledger(undisturbed), done
    ours, theirs = metrics(run_dir), metrics(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1)), done
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), (done, one["step"])
