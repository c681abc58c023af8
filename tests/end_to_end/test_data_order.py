"""Every sample exactly once an epoch, in one order, whatever the processes, workers and
interruptions."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.data.shard_files import write_shards
from tests.launcher import Running, run, start, succeed
from tests.small_world import ledger, lines, make_world, metrics

ONCE, THRICE = [13, 20, 7], [5, 7]  # samples of the shards of two sources, with weights 1 and 3
EPOCHS, BATCH = 3, 4
STEPS = EPOCHS * (sum(ONCE) + 3 * sum(THRICE)) // BATCH
WAYS = [(1, 0), (2, 1), (4, 2)]  # processes, workers


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder)
    write_shards(folder / "once", ONCE)
    write_shards(folder / "thrice", THRICE)
    tree = yaml.safe_load(path.read_text())
    tree["batch"] = {"global": BATCH, "micro": 1}
    tree["train"] = {"epochs": EPOCHS}
    tree["checkpoint"] = {"every": 3, "keep": 2}
    tree["data"]["train"] = [
        {"shards": str(folder / "once")},
        {"shards": str(folder / "thrice"), "weight": 3.0},
    ]
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(config) -> Path:
    """A run of one process without workers, from its begin to its end."""
    succeed("train", config)
    return config.parent / "run"


def with_sources(run_dir: Path) -> list[tuple[int, int, str, str]]:
    """(position, source, shard, key), in the order of positions."""
    found = [line for file in (run_dir / "ledger").glob("*.jsonl") for line in lines(file)]
    return sorted((s["position"], s["source"], s["shard"], s["key"]) for s in found)


def test_each_sample_comes_as_often_as_its_weight_says(whole):
    seen = with_sources(whole)
    per_epoch = len(seen) // EPOCHS
    assert [position for position, *_ in seen] == list(range(STEPS * BATCH))
    for epoch in range(EPOCHS):
        times = Counter(seen[i][1:] for i in range(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert Counter((source, count) for (source, *_), count in times.items()) == {
            (0, 1): sum(ONCE),
            (1, 3): sum(THRICE),
        }
    orders = [[s[1:] for s in seen[e * per_epoch : (e + 1) * per_epoch]] for e in range(EPOCHS)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_samples_of_each_source_are_counted(whole):
    seen = with_sources(whole)
    for line in metrics(whole):
        of_source = Counter(source for position, source, *_ in seen[: line["step"] * BATCH])
        assert line["source_samples"] == [of_source[0], of_source[1]]


@pytest.mark.parametrize(
    "processes, workers",
    [WAYS[-1], *(pytest.param(*way, marks=pytest.mark.long) for way in WAYS[1:-1])],
)
def test_processes_and_workers_do_not_show(config, whole, tmp_path, processes, workers):
    overrides = [f"data.workers={workers}", f"run_dir={tmp_path / 'run'}"]
    succeed("train", config, *overrides, processes=processes)
    assert ledger(tmp_path / "run") == ledger(whole)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_interruptions_do_not_show(config, whole, tmp_path, seed):
    """Killed at random steps, and gone on with in another way each time."""
    chance = random.Random(seed)
    ways = chance.sample(WAYS, 3)
    stops = sorted(chance.sample(range(4, STEPS - 8), 2))
    run_dir = tmp_path / "run"
    for (processes, workers), stop in zip(ways, [*stops, None], strict=True):
        overrides = [f"data.workers={workers}", f"run_dir={run_dir}"]
        if stop is None:
            succeed("train", config, *overrides, processes=processes)
        else:
            running = start("train", config, *overrides, processes=processes)
            wait_for_step(run_dir, stop, running)
            running.kill()
            running.wait()
    assert ledger(run_dir) == ledger(whole)
    assert metrics(run_dir)[-1]["source_samples"] == metrics(whole)[-1]["source_samples"]


def wait_for_step(run_dir: Path, step: int, running: Running) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(p.is_alive() for p in running.processes):
        file = run_dir / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.01)


def test_other_data_than_the_run_began_with_are_refused(config, tmp_path):
    data = tmp_path / "data"
    write_shards(data, [9, 6])
    overrides = ["data.train.1.weight=1.0", f"data.train.1.shards={data}"]
    overrides += [f"run_dir={tmp_path / 'run'}", "train.epochs=1"]
    succeed("train", config, *overrides)
    (tmp_path / "run/checkpoints/step_00000013").rename(tmp_path / "run/checkpoints/last")
    (tmp_path / "run/checkpoints/latest").write_text("step_00000012\n")
    write_shards(tmp_path / "more", [2, 2, 2])
    (tmp_path / "more/000002.tar").rename(data / "000002.tar")
    (ended,) = run("train", config, *overrides)
    assert ended.code == 2
    assert "source 1 had 15 samples in 2 shards, and now has 17 in 3" in ended.err
    assert "init.from=" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_worker_that_is_killed_ends_the_run_with_a_word(config, tmp_path, processes):
    began = time.monotonic()
    running = start(
        "train",
        config,
        "data.workers=1",
        f"run_dir={tmp_path / 'run'}",
        processes=processes,
        before=die_while_decoding,
    )
    ended = running.wait(60)
    assert time.monotonic() - began < 45
    assert all(rank.code == 1 for rank in ended), ended
    assert "Traceback" not in ended[0].err
    assert "data worker" in ended[0].err and "at sample" in ended[0].err
    assert ".tar" in ended[0].err


def die_while_decoding(rank: int) -> None:
    """The fifteenth picture that a worker of rank 0 decodes is its last act."""
    from parallel_clip.data.feeding import training_data

    main, decode, count = os.getpid(), training_data.decode_picture, []

    def decode_or_die(*arguments):
        count.append(None)
        if rank == 0 and os.getpid() != main and len(count) == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*arguments)

    training_data.decode_picture = decode_or_die
