"""A run of several phases trains as open_clip does that is stopped, resized and gone on with."""

import json
from pathlib import Path

import pytest
import torch

from parallel_clip.model import kept_patches
from tests import reference
from tests.launcher import succeed
from tests.parity.cases import Case
from tests.parity.models import model_cfg
from tests.parity.run_files import read_ledger, read_metrics, write_config
from tests.parity.test_parity import (
    DECAY,
    OPTIMIZER,
    SEED,
    STEPS,
    WARMUP,
    assert_same_steps,
    assert_same_weights,
)
from tests.phases_reference import ReferencePhase, phases_run

CASES = [
    Case(tensor=2, sequence=True),
    Case(),
    Case(data=2),
    Case(pipeline=2, microbatches=4, stash=1),
    Case(tensor=2, sequence=True, pipeline=2, microbatches=2),
]
SMALL, LARGE, PATCH = 18, 30, 6
FIRST, SECOND = 10, 16  # the last steps of the phases but the last
RATES = (5e-4, 2e-4, 5e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[pytest.mark.parity] if number else [])
        for number, case in enumerate(CASES)
    ],
)
def test_twenty_steps_in_three_phases(case, tmp_path):
    large = model_cfg(vision={"patch_size": PATCH, "image_size": LARGE})
    small = model_cfg(vision={"patch_size": PATCH, "image_size": SMALL})
    weights = reference.make_checkpoint(large, seed=1, folder=tmp_path / "begun")
    shards = reference.make_shards(tmp_path / "shards", case.batch, image_size=32, seed=2)
    others = reference.make_shards(tmp_path / "others", case.batch, image_size=32, seed=3)
    config = {
        "init": {"from": str(tmp_path / "begun")},
        "parallel": case.parallel,
        "batch": {"global": case.batch, "micro": case.batch // case.data // case.microbatches},
        "precision": "fp32",
        "train": {"steps": STEPS},
        "optimizer": OPTIMIZER | {"lr": RATES[0]},
        "schedule": {"warmup": WARMUP},
        "phases": [
            {"until": "50%", "resolution": SMALL, "patch_dropout": 0.5},
            {"until": SECOND * case.batch + 1, "lr": RATES[1]},
            {"lr": RATES[2], "sources": [{"shards": others}]},
        ],
        "data": {"train": [{"shards": shards}], "augment": "none", "workers": 1},
        "ema": {"decay": DECAY},
        "checkpoint": {"every": 0},
        "log": {"every": 1, "ledger": True},
        "seed": SEED,
        "run_dir": str(tmp_path / "run"),
    }
    write_config(tmp_path / "config.yaml", config)
    said = succeed("train", tmp_path / "config.yaml", processes=case.processes)
    assert "from step 11 on: 30 x 30 pixels, 26 tokens, highest learning rate 0.0002" in said
    assert "vision positions interpolated from 5 x 5 to 3 x 3" in said
    checkpoints = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000010", "step_00000020"], (
        "a change of lr and sources needs none"
    )

    def batch_at(size: int, of: str = "shards") -> reference.Batch:
        folder = tmp_path / f"{of} at {size}"
        folder.mkdir()
        described = {"model_cfg": large, "preprocess_cfg": {"size": size, **reference.PREPROCESS}}
        (folder / "open_clip_config.json").write_text(json.dumps(described))
        return reference.batch_from_shards(tmp_path / of, folder)

    first, second, third = batch_at(SMALL), batch_at(LARGE), batch_at(LARGE, "others")
    positions = {
        (line["step"], Path(line["shard"]).name, line["key"]): line["position"]
        for line in read_ledger(tmp_path / "run")
    }

    def kept(step: int) -> torch.Tensor:
        places = [positions[step + 1, sample.shard, sample.key] for sample in first.samples]
        rows = [kept_patches(SEED, step + 1, place, 9, 4) for place in places]
        return torch.stack([torch.as_tensor(row) for row in rows])

    rates = [reference.cosine(peak, WARMUP, STEPS) for peak in RATES]
    wanted = phases_run(
        [
            ReferencePhase(FIRST, small, first, rates[0], kept),
            ReferencePhase(SECOND - FIRST, large, second, rates[1]),
            ReferencePhase(STEPS - SECOND, large, third, rates[2]),
        ],
        weights,
        ema_decay=DECAY,
        **{key: value for key, value in OPTIMIZER.items() if key != "lr"},
    )
    assert_same_steps(read_metrics(tmp_path / "run"), wanted, case.batch)
    succeed("convert", tmp_path / "run", tmp_path / "converted", "--to", "openclip")
    ours = reference.load_weights(tmp_path / "converted")
    assert_same_weights(ours, wanted.weights, rotary=False)
    succeed("convert", tmp_path / "run", tmp_path / "averages", "--to", "openclip", "--ema")
    assert_same_weights(reference.load_weights(tmp_path / "averages"), wanted.averages, False)
    described = json.loads((tmp_path / "converted/open_clip_config.json").read_text())
    assert described["model_cfg"]["vision_cfg"]["image_size"] == LARGE
