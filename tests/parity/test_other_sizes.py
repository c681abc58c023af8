"""A run that begins at another size trains as open_clip does from the file that it loads so."""

import json

import open_clip
import pytest

from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.resize_model import with_sizes
from tests import reference
from tests.launcher import succeed
from tests.parity.cases import Case
from tests.parity.models import MODELS
from tests.parity.run_files import read_metrics, write_config
from tests.parity.test_parity import (
    OPTIMIZER,
    STEPS,
    WARMUP,
    assert_same_steps,
    assert_same_weights,
)

CASES = [Case("plain", tensor=2, sequence=True, pipeline=2, microbatches=2), Case("clipa", data=2)]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps_at_another_size(case, tmp_path):
    small = MODELS[case.model]
    large = with_sizes(architecture_from_json(small, "small"), 48, 40).json
    file = tmp_path / "small/open_clip_model.safetensors"
    reference.make_checkpoint(small, seed=1, folder=tmp_path / "small")
    theirs = reference.build_model(large)
    open_clip.factory.load_checkpoint(theirs, str(file))

    (tmp_path / "large").mkdir()
    described = {"model_cfg": large, "preprocess_cfg": {"size": 48, **reference.PREPROCESS}}
    (tmp_path / "large/open_clip_config.json").write_text(json.dumps(described))
    shards = reference.make_shards(tmp_path / "shards", case.batch, image_size=48, seed=2)
    wanted = reference.reference_run(
        large,
        theirs.state_dict(),
        reference.batch_from_shards(tmp_path / "shards", tmp_path / "large"),
        steps=STEPS,
        learning_rate=reference.cosine(OPTIMIZER["lr"], WARMUP, STEPS),
        **{key: value for key, value in OPTIMIZER.items() if key != "lr"},
    )
    micro = case.batch // case.data // case.microbatches
    config = {
        "model": {"image_size": 48, "context_length": 40},
        "init": {"from": str(tmp_path / "small")},
        "parallel": case.parallel,
        "batch": {"global": case.batch, "micro": micro},
        "precision": "fp32",
        "train": {"steps": STEPS},
        "optimizer": OPTIMIZER,
        "schedule": {"warmup": WARMUP},
        "data": {"train": [{"shards": shards}], "augment": "none", "workers": 1},
        "log": {"every": 1},
        "run_dir": str(tmp_path / "run"),
    }
    write_config(tmp_path / "config.yaml", config)
    succeed("train", tmp_path / "config.yaml", processes=case.processes)
    assert_same_steps(read_metrics(tmp_path / "run"), wanted, case.batch)
    succeed("convert", tmp_path / "run", tmp_path / "converted", "--to", "openclip")
    ours = reference.load_weights(tmp_path / "converted")
    assert_same_weights(ours, wanted.weights, rotary=False)
