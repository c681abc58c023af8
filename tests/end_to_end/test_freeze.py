"""Frozen towers over the life of a run: thawed on the way, in bf16, in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests import reference
from tests.end_to_end.test_from_open_clip import GELU, OPTIMIZER
from tests.launcher import run, succeed
from tests.small_world import SAMPLES, make_world, metrics, state_of

THAWED, STEPS = 3, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config whose batch is all of its data, and an OpenCLIP folder `gelu` to begin with."""
    folder = tmp_path_factory.mktemp("world")
    config = yaml.safe_load(make_world(folder).read_text())
    reference.make_checkpoint(GELU, seed=4, folder=folder / "gelu")
    del config["model"]
    config |= {
        "init": {"from": str(folder / "gelu")},
        "batch": {"global": SAMPLES, "micro": SAMPLES // 4},
        "train": {"steps": THAWED},
        "optimizer": OPTIMIZER | {"betas": list(OPTIMIZER["betas"])},
        "schedule": {"kind": "constant", "warmup": 0},
        "checkpoint": {"every": 0},
    }
    config["data"] |= {"augment": "none"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


FREEZE = {"vision": "all", "text": {"unlocked_groups": 2}}


@pytest.fixture(scope="module")
def thawed(world) -> reference.Reference:
    """What open_clip does where FREEZE holds for THAWED steps."""
    return reference.reference_run(
        GELU,
        reference.load_weights(world / "gelu"),
        reference.batch_from_shards(world / "train", world / "gelu"),
        steps=STEPS,
        learning_rate=lambda step: OPTIMIZER["lr"],
        freeze=FREEZE,
        unlock_after=THAWED,
        **{k: v for k, v in OPTIMIZER.items() if k != "lr"},
    )


def assert_as_open_clip(folder: Path, wanted: reference.Reference, out: Path) -> None:
    ours = metrics(folder)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, theirs in zip(ours, wanted.steps, strict=True):
        for key in ("loss", "grad_norm", "logit_scale"):
            assert line[key] == pytest.approx(theirs[key], rel=1e-4), (line["step"], key)
    succeed("convert", folder, out, "--to", "openclip")
    weights = reference.load_weights(out)
    names = weights.keys()
    off = torch.cat([(weights[n] - wanted.weights[n]).flatten() for n in names]).norm()
    assert off <= 1e-4 * torch.cat([wanted.weights[n].flatten() for n in names]).norm()


def test_a_tower_that_is_thawed_goes_on_as_open_clips_does(world, thawed, tmp_path):
    """Adam begins with it where it is thawed, and a later resume knows since when."""
    command = "train", world / "config.yaml", f"run_dir={tmp_path / 'run'}"
    succeed(*command, f"freeze={FREEZE}", "parallel.tensor=2", processes=2)

    before = state_of(tmp_path / "run")
    refused = run(*command, "train.steps=5")[0]
    assert refused.code == 2 and "freeze.vision" in refused.err and "resume.allow" in refused.err
    assert state_of(tmp_path / "run") == before

    thaw = "resume.allow=[freeze]", "freeze={vision: null, text: null}"
    succeed(*command, *thaw, "train.steps=5", "parallel.pipeline=2", processes=2)
    succeed(*command, *thaw, f"train.steps={STEPS}", processes=2)
    assert_as_open_clip(tmp_path / "run", thawed, tmp_path / "out")


def test_a_tower_is_thawed_at_its_step(world, thawed, tmp_path):
    """With the same numbers; the towers' shares and counts of pairs meet in one step."""
    freeze = {
        "vision": {"unlocked_groups": 0, "unfreeze_at": "40%"},  # of 8 steps: 3.2
        "text": {"unlocked_groups": 2, "unfreeze_at": THAWED * SAMPLES + 5},
    }
    said = succeed(
        "train", world / "config.yaml", f"run_dir={tmp_path / 'run'}", f"train.steps={STEPS}",
        f"freeze={freeze}", "parallel.pipeline=2", processes=2,
    )  # fmt: skip
    assert "vision, a part of text" in said and "from step 4 on: 32 x 32 pixels" in said
    assert_as_open_clip(tmp_path / "run", thawed, tmp_path / "out")


def test_bf16_leaves_every_bit_of_what_is_frozen(world, tmp_path):
    """Across a resume, too, where the bits come from the checkpoint."""
    command = "train", world / "config.yaml", f"run_dir={tmp_path / 'run'}", "precision=bf16"
    freeze = "freeze={text: all, vision: {unlocked_groups: 1, norms: true}}"
    succeed(*command, freeze, processes=2)
    succeed(*command, freeze, "train.steps=5", "parallel.tensor=2", processes=2)
    succeed("convert", tmp_path / "run", tmp_path / "out", "--to", "openclip")
    before = reference.load_weights(world / "gelu")
    after = reference.load_weights(tmp_path / "out")
    model = reference.build_model(GELU)
    reference.lock_towers(model, {"text": "all", "vision": {"unlocked_groups": 1, "norms": True}})
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], after[name]) != parameter.requires_grad, name
