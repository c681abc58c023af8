"""Runs whose phases have different sources: which samples each step sees, in any layout and resumed
from anywhere."""

from __future__ import annotations

import os
import signal
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.data.shard_files import write_shards
from tests.end_to_end.test_phases import cut_back, numbers
from tests.launcher import run, start, succeed
from tests.small_world import lines, make_world, metrics, tensors

BATCH, STEPS = 8, 6
LAST = f"checkpoints/step_{STEPS:08d}"
BIG, CLEAN = [10, 22], [3, 1]  # samples of the shards: an epoch of the big set is 4 steps


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config of three phases of two steps: a big set, a clean one with a fourth of the big one,
    and the big one again. The model changes with the last alone."""
    folder = tmp_path_factory.mktemp("world")
    config = yaml.safe_load(make_world(folder).read_text())
    write_shards(folder / "big", BIG)
    write_shards(folder / "clean", CLEAN)
    big = {"shards": str(folder / "big")}
    clean = {"shards": str(folder / "clean"), "weight": 1.5}
    config["data"]["train"] = [big]
    config["checkpoint"] = {"every": 1, "keep": None}
    (folder / "plain.yaml").write_text(yaml.safe_dump(config))
    config["phases"] = [
        {"until": 2 * BATCH, "resolution": 16},
        {"until": 4 * BATCH, "resolution": 16, "sources": [clean, big | {"weight": 0.25}]},
        {},
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """A run that nothing interrupted, with a worker that reads ahead over the ends of phases."""
    said = succeed("train", world / "config.yaml", "data.workers=1", f"run_dir={world}/whole")
    assert "from step 5 on: 32 x 32 pixels" in said and "from step 3" not in said
    return world / "whole"


@pytest.fixture(scope="module")
def plain(world) -> Path:
    """A run over the big set alone."""
    succeed("train", world / "plain.yaml", f"run_dir={world}/plain")
    return world / "plain"


class Seen(NamedTuple):
    """step counts from 1; shard: folder and file."""

    step: int
    source: int
    shard: str
    key: str


def seen_by(run_dir: Path) -> list[Seen]:
    """What the ledger of a run says, in the order of positions, which leave none out."""
    found = [line for file in (run_dir / "ledger").glob("*.jsonl") for line in lines(file)]
    found.sort(key=lambda line: line["position"])
    assert [line["position"] for line in found] == list(range(STEPS * BATCH))
    return [
        Seen(line["step"], line["source"], "/".join(Path(line["shard"]).parts[-2:]), line["key"])
        for line in found
    ]


def stored(folder: Path) -> set[tuple[str, str]]:
    """(shard, key) of all samples in a folder, read by tarfile."""
    found = set()
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {(f"{folder.name}/{path.name}", name.split(".")[0]) for name in tar.getnames()}
    return found


def test_each_phase_sees_its_own_sources(world, whole):
    seen = seen_by(whole)
    assert [sample.step for sample in seen] == [1 + p // BATCH for p in range(STEPS * BATCH)]
    big, clean = stored(world / "big"), stored(world / "clean")
    first, second, third = seen[:16], seen[16:32], seen[32:]
    times = Counter((sample.shard, sample.key) for sample in (*first, *third))
    assert times == Counter(big), "the first and the last phase are one epoch of the big set"
    assert {sample.source for sample in (*first, *third)} == {0}
    epoch = second[:14]  # 1.5 x 4 and 0.25 x 32, whatever batch they are in
    times = Counter((sample.source, sample.shard, sample.key) for sample in epoch)
    assert {key[1:] for key in times if key[0] == 1} == clean
    assert sorted(count for key, count in times.items() if key[0] == 1) == [1, 1, 2, 2]
    assert [count for key, count in times.items() if key[0] == 0] == [1] * 8
    assert {key[1:] for key in times if key[0] == 0} <= big
    counts = [line["source_samples"] for line in metrics(whole)]
    of_steps = [Counter(s.source for s in seen[: BATCH * step]) for step in range(1, STEPS + 1)]
    assert counts == [[found[0], found[1]] for found in of_steps]


def test_phases_apart_go_on_as_if_there_were_no_other(whole, plain):
    ours, theirs = seen_by(whole), seen_by(plain)
    of_big = [sample[1:] for sample in (*ours[:16], *ours[32:])]
    assert of_big == [sample[1:] for sample in theirs[:32]]


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_goes_on_at_a_boundary_with_the_same_bits(world, whole, tmp_path, step):
    """Where the sources change alone, and the model with them."""
    folder = cut_back_plain(whole, tmp_path / "run", step)
    said = succeed("train", world / "config.yaml", f"run_dir={folder}")
    assert f"(step {step})" in said
    assert tensors(folder / LAST) == tensors(whole / LAST)
    assert numbers(folder) == numbers(whole) and seen_by(folder) == seen_by(whole)
    assert metrics(folder)[-1]["source_samples"] == metrics(whole)[-1]["source_samples"]


def cut_back_plain(whole: Path, folder: Path, step: int) -> Path:
    (whole / "evaluations.jsonl").touch()  # there are none
    return cut_back(whole, folder, step)


def die_in_the_step(step: int, rank: int) -> None:
    from parallel_clip.training.sample_log import SampleLog

    write = SampleLog.write_ledger

    def write_or_die(self, at: int, batch) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, at, batch)

    SampleLog.write_ledger = write_or_die


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_inside_a_phase_sees_each_sample_as_if_it_had_not_been(
    world, whole, tmp_path, processes
):
    folder = tmp_path / "run"
    words = "train", world / "config.yaml", f"run_dir={folder}"
    before = partial(die_in_the_step, 4)
    ended = start(*words, "data.workers=1", processes=processes, before=before).wait()
    assert all(one.code == -signal.SIGKILL for one in ended), ended
    said = succeed(*words)
    assert "(step 3)" in said
    assert seen_by(folder) == seen_by(whole)
    if processes == 1:
        assert tensors(folder / LAST) == tensors(whole / LAST)


def test_a_running_run_may_be_given_other_sources_for_its_end(world, plain, tmp_path):
    folder = cut_back_plain(plain, tmp_path / "run", 4)
    phases = [{"until": 5 * BATCH}, {"sources": [{"shards": str(world / "clean")}]}]
    words = "train", world / "plain.yaml", f"run_dir={folder}"
    (refused,) = run(*words, f"phases={phases}")
    assert refused.code == 2 and "phases.1.sources" in refused.err
    early = [{"until": 3 * BATCH}, phases[1]]
    (refused,) = run(*words, f"phases={early}", "resume.allow=[phases]")
    assert refused.code == 2 and "has seen 32 pairs, which with these phases" in refused.err
    succeed(*words, f"phases={phases}", "resume.allow=[phases]")
    seen = seen_by(folder)
    assert seen[:40] == seen_by(plain)[:40]
    assert Counter((s.shard, s.key) for s in seen[40:]) == Counter(
        2 * list(stored(world / "clean"))
    )
    assert metrics(folder)[-1]["source_samples"] == [40, 8]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("phases.1.sources.0.wieght=2.0", "unknown key phases.1.sources.0.wieght; did you mean"),
        ("phases.1.sources.0.shards={world}/clean/{{000000..000009}}.tar", "clean/000002.tar"),
        ("phases.1.sources.0.shards={world}/nowhere", "nowhere"),
        ("phases.1.sources.0.samples=0", "phases.1.sources.0.samples is 0; expected"),
        ("train={{epochs: 2}}", "phases have different ones; give train.samples or train.steps"),
        ("phases.1.sources.1.caption_key=alt", "none of the first 32 samples can be used"),
    ],
)
def test_wrong_sources_are_told_before_the_first_step(world, tmp_path, override, told):
    words = override.format(world=world), f"run_dir={tmp_path / 'run'}"
    (ended,) = run("train", world / "config.yaml", *words)
    assert ended.code == 2 and told in ended.err and "Traceback" not in ended.err, ended.err
    assert not (tmp_path / "run").exists()


def test_other_shards_of_a_later_phase_are_refused_on_resuming(world, whole, tmp_path):
    """Before the run has come to them."""
    folder = cut_back_plain(whole, tmp_path / "run", 1)
    write_shards(tmp_path / "clean", [2, 2])
    words = f"run_dir={folder}", f"phases.1.sources.0.shards={tmp_path / 'clean'}"
    (ended,) = run("train", world / "config.yaml", *words)
    assert ended.code == 2 and "000000.tar, 000001.tar are of other samples" in ended.err, ended.err
