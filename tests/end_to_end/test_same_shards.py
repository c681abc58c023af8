"""Ranks of a run see the same shards, and a run goes on over those that it began with: else one
message names the shard."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.data.shard_files import write_shards
from tests.launcher import Ended, run, start, succeed
from tests.small_world import ledger, make_world

COUNTS = [8, 12, 10, 10]
SHARDS = "shards/{000000..000003}.tar"


@pytest.fixture
def world(tmp_path) -> Path:
    """A folder with a config whose shards are named relative to the working directory."""
    config = yaml.safe_load(make_world(tmp_path).read_text())
    config["data"]["train"] = [{"shards": SHARDS}]
    config["data"]["augment"] = "none"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write_shards(tmp_path / "shards", COUNTS)
    return tmp_path


def train(world: Path, *arguments: object, processes: int = 1) -> list[Ended]:
    return run("train", "config.yaml", *arguments, processes=processes, cwd=world)


def another(folder: Path, name: str, count: int) -> None:
    """Put a shard of as many other samples in the place of one."""
    path = write_shards(folder / "others", [3, count])[1]
    shutil.move(path, folder / name)


# -------------------------------------------------------------------------------- another time


def exchange_in_place(world: Path) -> list[str]:
    another(world / "shards", "000002.tar", 10)
    succeed("data", "index", "shards/*.tar", cwd=world)
    return ["000002.tar is of other samples"]


def exchange_by_name(world: Path) -> list[str]:
    """One is removed and another of as many samples added."""
    (world / "shards/000002.tar").unlink()
    another(world / "shards", "000009.tar", 10)
    config = world / "config.yaml"
    config.write_text(config.read_text().replace(SHARDS, "shards"))
    return ["000002.tar is gone", "000009.tar is new"]


def swap_two(world: Path) -> list[str]:
    a, b, c = (world / "shards" / name for name in ("000002.tar", "000003.tar", "x"))
    a.rename(c), b.rename(a), c.rename(b)
    succeed("data", "index", "shards/*.tar", cwd=world)
    return ["000002.tar, 000003.tar are of other samples"]


def remove_one(world: Path) -> list[str]:
    (world / "shards/000003.tar").unlink()
    config = world / "config.yaml"
    config.write_text(config.read_text().replace("000003}", "000002}"))
    return ["40 samples in 4 shards, and now has 30 in 3", "000003.tar is gone"]


@pytest.mark.parametrize("change", [exchange_in_place, exchange_by_name, swap_two, remove_one])
def test_a_run_over_other_shards_is_refused(world, change):
    (ended,) = train(world, "train.steps=2", "schedule.kind=constant")
    assert ended.code == 0, ended
    told = change(world)
    (ended,) = train(world, "train.steps=4", "schedule.kind=constant")
    assert ended.code == 2 and ended.err.count("parallel-clip: ") == 1
    assert all(words in ended.err for words in told), ended.err


def test_a_folder_that_is_moved_is_no_change(world):
    (ended,) = train(world, "train.steps=2", "schedule.kind=constant")
    assert ended.code == 0, ended
    (world / "shards").rename(world / "moved")
    config = world / "config.yaml"
    config.write_text(config.read_text().replace(SHARDS, "moved/{000000..000003}.tar"))
    succeed("train", "config.yaml", "train.steps=5", "schedule.kind=constant", cwd=world)
    assert_each_once(world)


def test_a_run_without_a_missing_shard_goes_on_without_it(world):
    """On every rank, and when the shard is back."""
    missing = world / "shards/000001.tar"
    missing.rename(world / "away")
    skip = ("data.missing=skip", "data.max_missing_fraction=0.25", "schedule.kind=constant")
    first, _ = train(world, "train.steps=2", *skip, processes=2)
    assert first.code == 0, first
    assert "leaves out 1 of 4 shards" in first.out and "000001.tar does not exist" in first.out
    assert (world / "run/left_out_shards.txt").read_text() == "shards/000001.tar\n"
    (world / "away").rename(missing)
    (ended,) = train(world, "train.epochs=1", *skip)
    assert ended.code == 2 and "train.epochs" in ended.err  # the length, of which kinds do not mix
    resumed, _ = train(world, "train.steps=3", *skip, processes=2)
    assert resumed.code == 0, resumed
    assert "000001.tar was left out when the run began" in resumed.out
    seen = [(shard, key) for _, _, shard, key in ledger(world / "run")]
    assert len(seen) == len(set(seen)) == 24
    assert {Path(shard).name for shard, _ in seen} == {f"00000{n}.tar" for n in (0, 2, 3)}
    # As an error it is another shard than the run began with.
    (ended,) = train(world, "train.steps=4", "schedule.kind=constant")
    assert ended.code == 2 and "000001.tar is new" in ended.err


def assert_each_once(world: Path) -> None:
    seen = [(shard, key) for _, _, shard, key in ledger(world / "run")]
    assert len(seen) == len(set(seen)) == sum(COUNTS)


# ------------------------------------------------------------------------------ another machine


def elsewhere(folder: Path, rank: int) -> None:
    """Rank 1 is on a machine of its own, with a copy of the data."""
    if rank == 1:
        os.chdir(folder)
        os.environ["LOCAL_RANK"] = "0"


def lacks_a_shard(copy: Path) -> str:
    (copy / "000002.tar").unlink()
    return "shard shards/000002.tar cannot be read: No such file"


def has_another_shard(copy: Path) -> str:
    another(copy, "000002.tar", 10)
    return "000002.tar is of other samples"


def has_a_cut_shard(copy: Path) -> str:
    data = (copy / "000002.tar").read_bytes()
    (copy / "000002.tar").write_bytes(data[: len(data) // 2])
    return "000002.tar"


def has_a_stale_index(copy: Path) -> str:
    """Of before the shard was exchanged: files of equal size."""
    data = bytearray((copy / "000002.tar").read_bytes())
    another(copy, "000002.tar", 10)
    succeed("data", "index", f"{copy}/*.tar")
    (copy / "000002.tar").write_bytes(data)
    return "000002.tar"


@pytest.mark.parametrize(
    "spoil", [lacks_a_shard, has_another_shard, has_a_cut_shard, has_a_stale_index]
)
def test_a_machine_with_other_shards_is_named(world, spoil):
    copy = world / "machine/shards"
    shutil.copytree(world / "shards", copy)
    told = spoil(copy)
    before = partial(elsewhere, world / "machine")
    words = ("train", world / "config.yaml", f"run_dir={world}/run")
    for rank, ended in enumerate(start(*words, processes=2, cwd=world, before=before).wait(60)):
        assert ended.code == 2, ended
        assert rank or ("rank 1 on " in ended.err and told in ended.err), ended.err
    assert not (world / "run").exists()


def test_a_machine_with_other_held_out_shards_is_named(world):
    """In training and in an evaluation of what it gave."""
    write_shards(world / "held", [4])
    write_shards(world / "machine/held", [4, 4])
    (world / "machine/held/000001.tar").replace(world / "machine/held/000000.tar")
    before = partial(elsewhere, world / "machine")
    config = world / "config.yaml"
    config.write_text(config.read_text().replace(SHARDS, f"{world}/{SHARDS}"))
    words = ("train", config, f"run_dir={world}/run", "train.steps=2")
    held_out = ("evaluate.loss=held/000000.tar", "evaluate.every=2")
    ended = start(*words, *held_out, processes=2, cwd=world, before=before).wait(60)
    assert [one.code for one in ended] == [2, 2], ended
    assert "rank 1 on " in ended[0].err and "has other shards of evaluate.loss" in ended[0].err
    (one,) = run(*words, cwd=world)
    assert one.code == 0, one
    words = ("evaluate", "retrieval", world / "run", "--data", "held/000000.tar")
    ended = start(*words, processes=2, cwd=world, before=before).wait(60)
    assert [one.code for one in ended] == [2, 2], ended
    assert "000000.tar is of other samples" in ended[0].err


def test_a_machine_without_an_index_keeps_the_one_that_it_makes(world):
    copy = world / "machine/shards"
    shutil.copytree(world / "shards", copy)
    before = partial(elsewhere, world / "machine")
    words = ("train", world / "config.yaml", f"run_dir={world}/run", "train.steps=5")
    ended = start(*words, processes=2, cwd=world, before=before).wait(60)
    assert [one.code for one in ended] == [0, 0], ended
    assert (copy / "shards.index").read_bytes() == (world / "shards/shards.index").read_bytes()
    assert_each_once(world)
