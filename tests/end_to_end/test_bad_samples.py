"""Bad pictures and captions inside good shards: replaced, counted, listed, and too many of them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.data.shard_files import sample, write_shard
from tests.launcher import run, succeed
from tests.small_world import ledger, lines, make_world, metrics, tensors

LAST = "checkpoints/step_00000006"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config whose data are 24 samples, of which one picture and one caption are bad."""
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder)
    samples = {f"{number:03d}": dict(sample(number)) for number in range(24)}
    samples["005"]["jpg"] = samples["005"]["jpg"][:200]
    samples["017"]["txt"] = b"\xff\xfe"
    write_shard(folder / "some_bad.tar", samples)
    return path


def bad(config: Path) -> list[str]:
    return [f"data.train.0.shards={config.parent / 'some_bad.tar'}"]


@pytest.fixture(scope="module")
def tolerant(config) -> Path:
    """A run over two epochs that takes what is bad."""
    folder = config.parent / "tolerant"
    succeed("train", config, *bad(config), f"run_dir={folder}", "data.max_bad_fraction=0.5")
    return folder


def test_what_is_bad_is_counted_and_listed(tolerant):
    found = lines(tolerant / "bad_samples.jsonl")
    assert sorted(entry["key"] for entry in found) == ["005", "005", "017", "017"]  # two epochs
    for entry in found:
        assert entry["shard"].endswith("some_bad.tar")
        assert entry["step"] == entry["position"] // 8 + 1
        assert ("jpg" if entry["key"] == "005" else "UTF-8") in entry["reason"]
    for line in metrics(tolerant):
        so_far = sum(entry["step"] <= line["step"] for entry in found)
        assert line["bad_samples"] == so_far


def test_what_is_bad_is_replaced(tolerant):
    seen = ledger(tolerant)
    assert [position for _, position, _, _ in seen] == list(range(48))
    assert not {"005", "017"} & {key for _, _, _, key in seen}


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, ["parallel.tensor=2"]),
        pytest.param(2, [], marks=pytest.mark.long),
        pytest.param(1, ["data.workers=2"], marks=pytest.mark.long),
    ],
)
def test_the_replacements_do_not_depend_on_the_layout(
    config, tolerant, tmp_path, processes, overrides
):
    folder = tmp_path / "run"
    words = [*bad(config), f"run_dir={folder}", "data.max_bad_fraction=0.5", *overrides]
    succeed("train", config, *words, processes=processes)
    assert ledger(folder) == ledger(tolerant)
    assert lines(folder / "bad_samples.jsonl") == lines(tolerant / "bad_samples.jsonl")
    counts = [line["bad_samples"] for line in metrics(folder)]
    assert counts == [line["bad_samples"] for line in metrics(tolerant)]


def test_the_replacements_are_the_same_after_going_on(config, tolerant, tmp_path):
    folder = tmp_path / "run"
    constant = [*bad(config), "data.max_bad_fraction=0.5", "schedule.kind=constant"]
    succeed("train", config, *constant, f"run_dir={folder}", "train.steps=2")
    succeed("train", config, *constant, f"run_dir={folder}")
    whole = tmp_path / "whole"
    succeed("train", config, *constant, f"run_dir={whole}")
    assert ledger(folder) == ledger(whole) == ledger(tolerant)
    assert lines(folder / "bad_samples.jsonl") == lines(tolerant / "bad_samples.jsonl")
    assert tensors(folder / LAST) == tensors(whole / LAST)


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.long)])
def test_too_much_of_it_ends_the_run(config, tolerant, tmp_path, processes):
    folder = tmp_path / "run"
    first, *others = run("train", config, *bad(config), f"run_dir={folder}", processes=processes)
    assert first.code == 1 and all(ended.code == 1 and not ended.err for ended in others)
    entry = lines(tolerant / "bad_samples.jsonl")[0]
    for words in (entry["key"], "some_bad.tar", entry["reason"], "data.max_bad_fraction 0.01"):
        assert words in first.err
    assert "Traceback" not in first.err and first.err.count("parallel-clip: ") == 1
    assert lines(folder / "bad_samples.jsonl")[0] == entry


def test_data_check_finds_them_beforehand(config):
    shard = config.parent / "some_bad.tar"
    (ended,) = run("data", "check", shard)
    assert ended.code == 2
    found = ended.out.splitlines()
    assert found[-1] == "1 shards, 24 samples, 2 broken"
    assert "005" in found[0] and "017" in found[1] and "UTF-8" in found[1]
    assert run("data", "check", shard, config.parent / "train", "--workers", 2)[0].code == 2
    assert succeed("data", "check", config.parent / "train").endswith("40 samples, 0 broken\n")


def test_a_header_that_changed_since_it_was_indexed_is_a_bad_sample(config, tmp_path):
    """Of the same size, so nothing but the sample tells."""
    shard = write_shard(tmp_path / "a.tar", {f"{n:03d}": sample(n) for n in range(24)})
    succeed("data", "index", shard)
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        place = next(member.offset for member in tar if member.name == "011.txt")
    data[place + 2] ^= 4  # 011.txt is called 015.txt now
    shard.write_bytes(data)

    folder = tmp_path / "run"
    overrides = [f"data.train.0.shards={shard}", f"run_dir={folder}", "data.max_bad_fraction=0.5"]
    succeed("train", config, *overrides)
    found = lines(folder / "bad_samples.jsonl")
    assert [entry["key"] for entry in found] == ["011", "011"]  # two epochs
    assert all("damaged in the shard" in entry["reason"] for entry in found)
    assert metrics(folder)[-1]["bad_samples"] == 2
    assert "011" not in {key for _, _, _, key in ledger(folder)}

    (ended,) = run("data", "check", shard)
    assert ended.code == 2 and f"{shard}, 011: damaged in the shard" in ended.out


def test_a_shard_that_was_cut_since_it_was_indexed_is_refused(config, tmp_path):
    shard = write_shard(tmp_path / "a.tar", {f"{n:03d}": sample(n) for n in range(24)})
    succeed("data", "index", shard)
    shard.write_bytes(shard.read_bytes()[:-20480])
    (ended,) = run("train", config, f"data.train.0.shards={shard}", f"run_dir={tmp_path / 'run'}")
    assert ended.code == 2 and not (tmp_path / "run").exists()
    assert f"shard {shard} has" in ended.err and "with 24 samples" in ended.err
    (ended,) = run("data", "check", shard)
    assert ended.code == 2 and f"{shard}, " in ended.out
