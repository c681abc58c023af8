"""What a run leaves behind, and what going on with it keeps: bits, order, one line a step."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from parallel_clip.config import load_config
from tests.launcher import run, start, succeed
from tests.small_world import SAMPLES, ledger, lines, make_world, metrics, state_of, tensors

STEPS = 6
LAST = f"checkpoints/step_{STEPS:08d}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """A run that nothing interrupted, of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeed("train", config, f"run_dir={folder}")
    return folder


@pytest.fixture
def interrupted(whole, tmp_path) -> Path:
    """The same run as it is when it was killed in step 5, its last line half written."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / LAST)
    (folder / "checkpoints/latest").write_text("step_00000004\n")
    with (folder / "metrics.jsonl").open("r+") as file:
        kept = file.read().splitlines(keepends=True)[:5]
        file.seek(0)
        file.truncate()
        file.write("".join(kept) + kept[-1][:20])
    return folder


def go_on(config: Path, folder: Path, *overrides: str, processes: int = 1) -> str:
    return succeed("train", config, f"run_dir={folder}", *overrides, processes=processes)


def refused(config: Path, folder: Path, *overrides: str) -> str:
    """The message with which a run is refused that must not change what it finds."""
    before = state_of(folder)
    (ended,) = run("train", config, f"run_dir={folder}", *overrides)
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    assert state_of(folder) == before
    return ended.err


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_everything_of_the_contract_is_there(whole, config):
    found = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "ledger"} <= found
    assert (whole / "checkpoints/latest").read_text() == f"step_{STEPS:08d}\n"
    steps = sorted(path.name for path in (whole / "checkpoints").glob("step_*"))
    assert steps == ["step_00000002", "step_00000004", "step_00000006"]
    assert list((whole / "tensorboard").glob("events.*"))


def test_the_config_is_kept_with_every_default(whole, config):
    kept = load_config(whole / "config.yaml")
    assert kept == load_config(config, [f"run_dir={whole}"])
    assert yaml.safe_load((whole / "config.yaml").read_text()) == kept.to_tree()


def test_the_environment_is_kept(whole):
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["layout"] == {
        "data": 1, "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False
    }  # fmt: skip
    assert environment["packages"]["torch"] and environment["packages"]["megatron-core"]


def test_the_ledger_has_every_position_once_in_its_step(whole):
    seen = ledger(whole)
    assert [position for _, position, _, _ in seen] == list(range(8 * STEPS))
    assert all(step == position // 8 + 1 for step, position, _, _ in seen)
    first_epoch = {(shard, key) for _, position, shard, key in seen if position < SAMPLES}
    assert len(first_epoch) == SAMPLES
    assert {line["source"] for line in lines(whole / "ledger/rank_00000.jsonl")} == {0}


def test_a_finished_run_says_so_and_changes_nothing(whole, config):
    before = state_of(whole)
    assert "is finished: 6 of 6 steps" in go_on(config, whole)
    assert state_of(whole) == before


def test_the_same_run_twice_has_the_same_bits(whole, config, tmp_path):
    go_on(config, tmp_path / "run", "data.workers=2")
    assert losses(tmp_path / "run") == losses(whole)
    assert tensors(tmp_path / "run" / LAST) == tensors(whole / LAST)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, config, tmp_path):
    folder = tmp_path / "run"
    running = start("train", config, f"run_dir={folder}")
    while running.processes[0].is_alive() and not _logged(folder, 3):
        time.sleep(0.002)
    running.kill()
    assert running.wait()[0].code == -9
    assert not (folder / LAST).exists()
    assert "(step 2)" in go_on(config, folder) or len(metrics(folder)) > 3
    assert losses(folder) == losses(whole) and ledger(folder) == ledger(whole)
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    assert tensors(folder / LAST) == tensors(whole / LAST)


def _logged(folder: Path, steps: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) >= steps


def test_logs_are_cut_back_to_the_step_gone_on_from(whole, interrupted, config):
    assert f"{interrupted}/checkpoints/step_00000004 (step 4)" in go_on(config, interrupted)
    assert losses(interrupted) == losses(whole) and ledger(interrupted) == ledger(whole)
    assert tensors(interrupted / LAST) == tensors(whole / LAST)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, ["batch.micro=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "recompute=full"]),
        (1, ["batch.micro=8", "parallel.distributed_optimizer=false", "data.workers=1"]),
    ],
)
def test_a_run_goes_on_in_another_layout(
    whole, interrupted, config, processes: int, overrides: list[str]
):
    go_on(config, interrupted, *overrides, processes=processes)
    assert losses(interrupted) == pytest.approx(losses(whole), rel=1e-4)
    assert ledger(interrupted) == ledger(whole)
    environment = json.loads((interrupted / "environment.json").read_text())
    assert environment["world_size"] == processes


def test_two_processes_see_the_batches_of_one(whole, config, tmp_path):
    go_on(config, tmp_path / "run", processes=2)
    assert ledger(tmp_path / "run") == ledger(whole)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_a_longer_run_goes_on_where_the_schedule_is_constant(config, tmp_path):
    go_on(config, tmp_path / "long", "schedule.kind=constant", "train.steps=4")
    go_on(config, tmp_path / "short", "schedule.kind=constant", "train.steps=2")
    go_on(config, tmp_path / "short", "schedule.kind=constant", "train.steps=4")
    assert losses(tmp_path / "short") == losses(tmp_path / "long")
    state = tensors(tmp_path / "long/checkpoints/step_00000004")
    assert tensors(tmp_path / "short/checkpoints/step_00000004") == state


def test_another_config_is_refused_key_by_key(whole, config):
    message = refused(config, whole, "train.steps=8", "optimizer.lr=0.5", "data.augment=none")
    assert "another config" in message and "another run_dir" in message
    for difference in ("train.steps: 6 → 8", "lr: 0.001 → 0.5", 'augment: "train" → "none"'):
        assert difference in message
    assert len(message.splitlines()) == 4


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds no run" in refused(config, tmp_path)


def test_a_model_file_that_has_changed_is_refused(whole, config, tmp_path):
    """The config still names the same file; what it says is another model."""
    file = Path(load_config(config).model.name)
    was = file.read_text()
    try:
        file.write_text(was.replace('"layers": 2', '"layers": 1'))
        assert "another architecture" in refused(config, whole)
    finally:
        file.write_text(was)


@pytest.mark.parametrize("damage", ["cut", "gone", "no index", "wrong pointer", "strange meta"])
def test_a_damaged_checkpoint_is_refused(interrupted, config, damage):
    checkpoint = interrupted / "checkpoints/step_00000004"
    pieces = checkpoint / "rank_00000_000.safetensors"
    if damage == "cut":
        pieces.write_bytes(pieces.read_bytes()[:-1000])
    elif damage == "gone":
        pieces.unlink()
    elif damage == "no index":
        (checkpoint / "index.json").write_text("{")
    elif damage == "wrong pointer":
        (interrupted / "checkpoints/latest").write_text("step_00000005\n")
    else:
        (checkpoint / "meta.json").write_text('{"format": 1, "steps": 4}')
    message = refused(config, interrupted)
    assert "step_00000004" in message


def test_a_run_without_a_checkpoint_begins_again(whole, interrupted, config):
    shutil.rmtree(interrupted / "checkpoints")
    go_on(config, interrupted)
    assert losses(interrupted) == losses(whole) and ledger(interrupted) == ledger(whole)


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    go_on(config, tmp_path / "run", "checkpoint.keep=1", "checkpoint.every=1", "train.steps=3")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_00000003"]
