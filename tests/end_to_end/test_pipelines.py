"""Runs whose model lies on the stages of a pipeline, beside the same run in one process."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from tests.data.shard_files import sample, write_shard
from tests.launcher import start, succeed
from tests.small_world import ledger, make_world, metrics

#          processes, overrides
LAYOUTS = {
    "pipeline2": (2, ["parallel.pipeline=2"]),
    "pipeline2-virtual2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "pipeline3-by-hand": (
        3, ["parallel.pipeline=3", "parallel.stages={vision: [1, 1, 0], text: [0, 1, 1]}"],
    ),
    "data2-pipeline2": (4, ["parallel.pipeline=2", "batch.micro=2", "parallel.stash=1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config that evaluates on `held_out.tar`: 20 pictures of 3 classes."""
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder)
    samples = {f"{number:03d}": dict(sample(number)) for number in range(20)}
    for number, files in enumerate(samples.values()):
        files["cls"] = str(number % 3).encode()
    write_shard(folder / "held_out.tar", samples)
    (folder / "classes.txt").write_text("red circle\nblue square\ngreen ring\n")
    return path


def train(config: Path, run: Path, processes: int = 1, *overrides: str) -> Path:
    folder = config.parent
    evaluated = [
        "evaluate.every=4", f"evaluate.loss={folder}/held_out.tar", "evaluate.batch=7",
        f"evaluate.retrieval={folder}/held_out.tar",
        f"evaluate.zero_shot={{shards: {folder}/held_out.tar, classes: {folder}/classes.txt}}",
    ]  # fmt: skip
    arguments = [f"run_dir={run}", *evaluated, *overrides]
    shown = succeed("train", config, *arguments, processes=processes)
    assert "finished: 6 steps" in shown
    return run


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory) -> Path:
    return train(config, tmp_path_factory.mktemp("plain") / "run")


def assert_same_steps(run: Path, expected: Path) -> None:
    found, wanted = metrics(run), metrics(expected)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for key in ("loss", "grad_norm", "logit_scale", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


def evaluations(run: Path) -> list[dict[str, float]]:
    """Flat figures of each evaluation, by name."""
    found = []
    for line in (run / "evaluations.jsonl").read_text().splitlines():
        figures = json.loads(line)
        for kind in ("retrieval", "zero_shot"):
            figures |= {f"{kind}/{name}": value for name, value in figures.pop(kind).items()}
        found.append(figures)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_do_not_show(config, plain, tmp_path, layout):
    processes, overrides = LAYOUTS[layout]
    run = train(config, tmp_path / "run", processes, *overrides)
    assert_same_steps(run, plain)
    assert ledger(run) == ledger(plain)
    for found, wanted in zip(evaluations(run), evaluations(plain), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    data = ["--data", config.parent / "held_out.tar", "--json", "-"]
    figures = json.loads(succeed("evaluate", "retrieval", run, *data))
    retrieval = {f"retrieval/{name}": value for name, value in figures.items()}
    assert evaluations(run)[-1].items() >= retrieval.items()


def test_a_run_goes_on_with_other_stages(config, plain, tmp_path):
    run = tmp_path / "run"
    for processes, overrides in LAYOUTS.values():
        if run.exists():  # as if it had been interrupted: the newest checkpoint is that of step 2
            shutil.rmtree(run / "checkpoints" / "step_00000006")
            shutil.rmtree(run / "checkpoints" / "step_00000004")
            (run / "checkpoints" / "latest").write_text("step_00000002\n")
        train(config, run, processes, *overrides)
        assert_same_steps(run, plain)


@pytest.mark.parametrize(
    "victim", [1, *(pytest.param(rank, marks=pytest.mark.long) for rank in (0, 2))]
)
def test_a_stage_that_dies_ends_the_run(config, tmp_path, victim):
    run = tmp_path / "run"
    overrides = ["parallel.pipeline=3", "train.steps=100000", "schedule.warmup=0", "log.every=1"]
    running = start("train", config, f"run_dir={run}", *overrides, processes=3)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline, "no third step in two minutes"
        time.sleep(0.2)
    running.processes[victim].kill()
    ended = running.wait(timeout=60)
    for rank, process in enumerate(ended):
        assert process.code != 0
        if rank != victim:
            assert process.err.strip().endswith("the rank that failed says why"), (rank, process)
            assert "Traceback" not in process.err


@pytest.mark.parametrize(
    "failing", [2, *(pytest.param(rank, marks=pytest.mark.long) for rank in (0, 1))]
)
def test_a_stage_that_fails_says_why_and_ends_the_run(config, tmp_path, failing):
    """One rank runs out of memory in the middle of the second step's schedule."""
    overrides = ["parallel.pipeline=3", "batch.micro=2", "parallel.stash=0"]
    running = start(
        "train", config, f"run_dir={tmp_path / 'run'}", *overrides,
        processes=3, before=partial(fail_in_forward, failing),
    )  # fmt: skip
    ended = running.wait(timeout=60)
    assert [process.code for process in ended] == [1, 1, 1]
    assert f"rank {failing} failed" in ended[failing].err
    assert "out of memory" in ended[failing].err
    for rank in {0, 1, 2} - {failing}:
        assert "says why" in ended[rank].err and "Traceback" not in ended[rank].err


def fail_in_forward(failing: int, rank: int) -> None:
    from parallel_clip.model.clip import CLIPModel

    if rank != failing:
        return
    forward, calls = CLIPModel.forward, iter(range(1000))

    def forward_until_full(self, *inputs):
        if next(calls) == 14:  # a step of 4 microbatches runs 8 times forward
            raise MemoryError("out of memory")
        return forward(self, *inputs)

    CLIPModel.forward = forward_until_full
