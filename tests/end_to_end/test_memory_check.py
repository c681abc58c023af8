"""`plan.check` as users meet it: all ranks end before anything is written, what is offered trains,
and a real limit of memory is where the plan sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_clip.config import load_config
from parallel_clip.engine.host_memory import memory_cgroups
from parallel_clip.plan.run_plan import make_run_plan
from tests.end_to_end.test_torchrun import ENVIRONMENT, torchrun
from tests.launcher import run, succeed
from tests.small_world import make_world, metrics, state_of


@pytest.fixture
def config(tmp_path) -> Path:
    return make_world(tmp_path)


def offers(words: str) -> list[str]:
    return [line.strip() for line in words.splitlines() if line.startswith("  ")]


def test_all_ranks_end_with_one_message_and_what_it_offers_trains(config):
    batch = "plan.check=error", "batch.global=64", "batch.micro=32"
    plan, _ = make_run_plan(load_config(config, batch), 2)
    memory = plan.prediction.memory.total - 1
    words = "train", config, *batch, f"parallel.memory={memory}", "train.steps=1"
    before = state_of(config.parent)
    first, second = run(*words, processes=2)
    assert (first.code, second.code) == (2, 2)
    assert f"stage 0 needs more memory than there is: {memory / 1e9:.2f} GB (" in first.err
    assert f"a rank has {memory / 1e9:.2f} GB, parallel.memory {memory}" in first.err
    assert second.err == "" and "Traceback" not in first.err
    assert state_of(config.parent) == before, "nothing is written"

    found = offers(first.err)
    assert len(found) == 3
    said = succeed(*words, *found[0].split(), processes=2)
    assert "  predicted memory" in said
    assert "GB measured, " in said.splitlines()[-2] and said.splitlines()[-1].startswith("finished")
    run_dir = config.parent / "run"
    (predicted,) = json.loads((run_dir / "environment.json").read_text())["predicted"]
    kinds = predicted["memory_bytes"]
    assert sum(size for kind, size in kinds.items() if kind != "total") == kinds["total"] <= memory
    assert (predicted["first_step"], predicted["last_step"]) == (1, 1)
    measured = metrics(run_dir)[-1]["memory_bytes"]
    assert 0.5 < predicted["metrics_memory_bytes"] / measured < 2
    # `plan.*` and what was offered may change when a run is resumed.
    more = "train.steps=1", "plan.check=warn", "plan.device=h100"
    assert "is finished" in succeed(*words, *more, processes=2)


@pytest.mark.long
def test_every_rank_of_torchrun_ends_with_2(config):
    before = state_of(config.parent)
    process = torchrun("train", config, "plan.check=error", "parallel.memory=0.5GB")
    _, err = process.communicate(timeout=120)
    assert err.count("needs more memory than there is") == 1
    assert "No layout of 2 processes fits" in err
    # The agent may send the second one a signal before it has seen it end.
    assert "exitcode  : 2" in err and "exitcode  : 1 " not in err
    assert state_of(config.parent) == before


@contextlib.contextmanager
def cgroup_of(limit: int) -> Iterator[Path]:
    """A memory cgroup of so many bytes below this process's own."""
    for own in memory_cgroups(Path("/")):
        folder = own / "parallel_clip_test"
        with contextlib.suppress(OSError):
            folder.mkdir()
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (folder / name).exists():
                    (folder / name).write_text(str(limit))
                    try:
                        yield folder
                    finally:
                        folder.rmdir()
                    return
            folder.rmdir()
    pytest.skip("no memory cgroup can be made here")


@pytest.mark.long
def test_a_real_limit_of_memory_is_where_the_plan_sees_it(config):
    """Of 4.5 GB, in a cgroup: what is predicted to fit trains, what is not is refused, and is
    killed where it is tried all the same."""
    words = [
        "train", str(config), "model.name=ViT-B-32", "batch.global=32", "train.steps=2",
        "schedule.warmup=1", "checkpoint.every=0", "plan.check=error",
    ]  # fmt: skip

    with cgroup_of(4_500_000_000) as folder:

        def ended(*overrides: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                [sys.executable, "-m", "parallel_clip", *words, *overrides],
                env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
                preexec_fn=lambda: (folder / "cgroup.procs").write_text(str(os.getpid())),
            )  # fmt: skip

        refused = ended("batch.micro=32")
        assert refused.returncode == 2
        assert "4.50 GB of the cgroup" in refused.stderr
        for number, layout in enumerate(offers(refused.stderr)):
            trained = ended("batch.micro=32", *layout.split(), f"run_dir={config.parent}/{number}")
            assert trained.returncode == 0, trained.stderr
        killed = ended("batch.micro=32", "plan.check=warn", f"run_dir={config.parent}/killed")
        assert killed.returncode == -signal.SIGKILL
