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


def test_a_tower_that_is_thawed_goes_on_as_open_clips_does(world, tmp_path):
    """Adam begins with it where it is thawed, and a later resume knows since when."""
    freeze = {"vision": "all", "text": {"unlocked_groups": 2}}
    command = "train", world / "config.yaml", f"run_dir={tmp_path / 'run'}"
    succeed(*command, f"freeze={freeze}", "parallel.tensor=2", processes=2)

    before = state_of(tmp_path / "run")
    refused = run(*command, "train.steps=5")[0]
    assert refused.code == 2 and "freeze.vision" in refused.err and "resume.allow" in refused.err
    assert state_of(tmp_path / "run") == before

    thaw = "resume.allow=[freeze]", "freeze={vision: null, text: null}"
    succeed(*command, *thaw, "train.steps=5", "parallel.pipeline=2", processes=2)
    succeed(*command, *thaw, f"train.steps={STEPS}", processes=2)

    wanted = reference.reference_run(
        GELU,
        reference.load_weights(world / "gelu"),
        reference.batch_from_shards(world / "train", world / "gelu"),
        steps=STEPS,
        learning_rate=lambda step: OPTIMIZER["lr"],
        freeze=freeze,
        unlock_after=THAWED,
        **{k: v for k, v in OPTIMIZER.items() if k != "lr"},
    )
    ours = metrics(tmp_path / "run")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, theirs in zip(ours, wanted.steps, strict=True):
        for key in ("loss", "grad_norm", "logit_scale"):
            assert line[key] == pytest.approx(theirs[key], rel=1e-4), (line["step"], key)
    succeed("convert", tmp_path / "run", tmp_path / "out", "--to", "openclip")
    weights = reference.load_weights(tmp_path / "out")
    names = weights.keys()
    off = torch.cat([(weights[n] - wanted.weights[n]).flatten() for n in names]).norm()
    assert off <= 1e-4 * torch.cat([wanted.weights[n].flatten() for n in names]).norm()


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
