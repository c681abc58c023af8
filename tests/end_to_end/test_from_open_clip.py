"""Runs that begin with what somebody else has trained: its weights, its model, its optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel_clip.checkpoint import commit
from tests import reference
from tests.data.samples.tokenizer_folders import make_spiece
from tests.launcher import run, succeed
from tests.small_world import MODEL, SAMPLES, metrics, one_batch_config

OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
SAVED, STEPS, WARMUP = 3, 8, 2
GELU = MODEL | {"quick_gelu": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config whose batch is all of its data, without `model`; an OpenCLIP folder `gelu`."""
    folder = tmp_path_factory.mktemp("world")
    config = one_batch_config(folder) | {
        "train": {"steps": STEPS},
        "optimizer": OPTIMIZER | {"betas": list(OPTIMIZER["betas"])},
        "schedule": {"warmup": WARMUP},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    reference.make_checkpoint(GELU, seed=4, folder=folder / "gelu")
    return folder


def two_of_a_kind(world: Path, run_dir: Path, *arguments: Any) -> str:
    """Train on two processes; what was printed."""
    return succeed("train", world / "config.yaml", f"run_dir={run_dir}", *arguments, processes=2)


def read_config(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())


# --------------------------------------------------------------------------------- half a run of it


@pytest.fixture(scope="module")
def half_trained(world) -> tuple[Path, reference.Reference]:
    """open_clip's file after SAVED steps, and what it did in all STEPS."""
    batch = reference.batch_from_shards(world / "train", world / "gelu")
    file = world / "epoch_1.pt"
    trained = reference.reference_run(
        GELU,
        reference.load_weights(world / "gelu"),
        batch,
        steps=STEPS,
        learning_rate=reference.cosine(OPTIMIZER["lr"], WARMUP, STEPS),
        save=(SAVED, file),
        **{k: v for k, v in OPTIMIZER.items() if k != "lr"},
    )
    return file, trained


LAYOUTS = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"]


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS[1:])]
)
def test_the_next_steps_are_open_clips(world, half_trained, tmp_path, layout):
    file, trained = half_trained
    described = world / "gelu/open_clip_config.json"
    out = succeed(
        "convert", file, tmp_path / "run", "--to", "run", "--model", described,
        "--with-optimizer", "--global-batch", SAMPLES,
    )  # fmt: skip
    assert f"AdamW's state after step {SAVED} comes along" in out
    two_of_a_kind(world, tmp_path / "run", layout, "log.every=1")
    found = metrics(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(SAVED + 1, STEPS + 1))
    for ours, theirs in zip(found, trained.steps[SAVED:], strict=True):
        for key in ("loss", "grad_norm", "lr", "logit_scale"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours, theirs)
    succeed("convert", tmp_path / "run", tmp_path / "back", "--to", "openclip")
    back = reference.load_weights(tmp_path / "back")
    for name, tensor in trained.weights.items():
        assert torch.allclose(back[name], tensor, atol=1e-5), name


def test_another_batch_than_that_of_the_optimizer_is_refused(world, half_trained, tmp_path):
    succeed(
        "convert", half_trained[0], tmp_path / "run", "--to", "run", "--model",
        world / "gelu/open_clip_config.json", "--with-optimizer", "--global-batch", 32,
    )  # fmt: skip
    ended = run("train", world / "config.yaml", f"run_dir={tmp_path}/run")[0]
    assert ended.code == 2 and f"batch was 32 pairs, and batch.global is {SAMPLES}" in ended.err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--with-optimizer"], "--global-batch N belong together"),
        (["--global-batch", 8], "--global-batch N belong together"),
    ],
)
def test_the_batch_has_to_be_given(world, half_trained, tmp_path, arguments, told):
    ended = run("convert", half_trained[0], tmp_path / "x", "--to", "run", *arguments)[0]
    assert ended.code == 2 and told in ended.err and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------- which model it is


def test_a_run_without_a_name_trains_the_model_that_it_starts_from(world, tmp_path):
    """And goes on without one, with the resolved one, and not with another."""
    run_dir = tmp_path / "run"
    start = f"init.from={world}/gelu"
    out = two_of_a_kind(world, run_dir, start, "train.steps=2", "schedule.kind=constant")
    preprocessing = [line for line in out.splitlines() if "preprocessing: " in line]
    assert len(preprocessing) == 1 and "gelu/open_clip_config.json" in preprocessing[0]
    assert read_config(run_dir)["model"]["name"] == f"{run_dir}/model.json"
    described = json.loads((run_dir / "model.json").read_text())
    assert described["model_cfg"] == GELU
    assert described["preprocess_cfg"]["mean"] == reference.PREPROCESS["mean"]
    longer = [start, "train.steps=3", "schedule.kind=constant"]
    two_of_a_kind(world, run_dir, *longer)
    two_of_a_kind(world, run_dir, *longer[:1], "train.steps=4", "schedule.kind=constant",
                  f"model.name={run_dir}/model.json")  # fmt: skip
    assert commit.latest(run_dir).name == "step_00000004"
    ended = run(
        "train", world / "config.yaml", f"run_dir={run_dir}", *longer, "model.name=ViT-B-32"
    )
    assert ended[0].code == 2 and "model.name" in ended[0].err


def test_another_model_than_the_weights_is_refused_or_meant(world, tmp_path):
    arguments = [f"init.from={world}/gelu", f"model.name={world}/model.json", "train.steps=1"]
    ended = run("train", world / "config.yaml", f"run_dir={tmp_path}/run", *arguments)[0]
    assert ended.code == 2 and "quick_gelu is True there and False here" in ended.err
    assert "model.override=[quick_gelu]" in ended.err and not (tmp_path / "run").exists()
    meant = [*arguments, "model.override=[quick_gelu]"]
    two_of_a_kind(world, tmp_path / "run", *meant)
    succeed("convert", tmp_path / "run", tmp_path / "back", "--to", "openclip")
    config = json.loads((tmp_path / "back/open_clip_config.json").read_text())
    assert config["model_cfg"] == MODEL

    for command in (
        ["convert", world / "gelu", tmp_path / "new", "--to", "run"],
        ["evaluate", "retrieval", world / "gelu", "--data", world / "train/000000.tar"],
    ):
        ended = run(*command, "--model", world / "model.json")[0]
        assert ended.code == 2 and "--override quick_gelu" in ended.err
        succeed(*command, "--model", world / "model.json", "--override", "quick_gelu")


def test_weights_that_are_not_finite_start_nothing(world, tmp_path):
    weights = reference.load_weights(world / "gelu")
    weights["visual.proj"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "x.pt")
    described = f"model.name={world}/gelu/open_clip_config.json"
    for ended in run("train", world / "config.yaml", described, f"init.from={tmp_path}/x.pt",
                     f"run_dir={tmp_path}/run", processes=2):  # fmt: skip
        assert ended.code == 2
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_holds_the_tokenizer_of_its_run(world, tmp_path):
    """Training goes on, and is evaluated and converted, after the tokenizer's file is gone."""
    tokenizer = make_spiece(tmp_path / "spiece") / "spiece.model"
    run_dir = tmp_path / "run"
    arguments = [f"init.from={world}/gelu", f"data.tokenizer={tokenizer}", "checkpoint.every=1",
                 "checkpoint.keep=1"]  # fmt: skip
    arguments += ["schedule.kind=constant"]
    two_of_a_kind(world, run_dir, *arguments, "train.steps=1")
    moved = tmp_path / "moved.model"
    tokenizer.rename(moved)
    run_dir = run_dir.rename(tmp_path / "moved run")
    two_of_a_kind(world, run_dir, *arguments, "train.steps=2")
    shards = ["--data", world / "train/{000000..000001}.tar", "--json", "-"]
    evaluated = json.loads(succeed("evaluate", "retrieval", run_dir, *shards))
    same = json.loads(succeed("evaluate", "retrieval", run_dir, *shards, "--tokenizer", moved))
    assert evaluated == same
    succeed("convert", run_dir, tmp_path / "openclip", "--to", "openclip")
    assert evaluated == json.loads(succeed("evaluate", "retrieval", tmp_path / "openclip", *shards))
    assert (tmp_path / "openclip/spiece.model").is_file()
