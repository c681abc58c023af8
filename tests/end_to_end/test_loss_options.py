"""`loss.duplicates` and `loss.label_smoothing` in the train command, against open_clip in fp64.

The data is one global batch. The reference runs open_clip's model on it, masks the logits of
captions with equal tokens, or of equal values, and has gradients of everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from tests import reference
from tests.data.shard_files import picture, write_shard
from tests.launcher import run, succeed
from tests.small_models import small_model
from tests.small_world import metrics

SAMPLES = 16
MODEL = small_model(text={"vocab_size": 49408, "context_length": 9})
SIGLIP = MODEL | {"init_logit_scale": 1.2, "init_logit_bias": -2.0}
# Eleven captions; letters and spaces do not count for the tokenizer, the last word is cut off.
CAPTIONS = [f"a {reference.COLOURS[n % 9]} ring" for n in range(SAMPLES - 4)]
CAPTIONS += ["A  Red RING", "one two three four five six seven", "a dog"]
CAPTIONS += ["one two three four five six seven eight"]
IDS = [n // 2 if n < 6 else None for n in range(SAMPLES)]  # three that are there twice


class World(NamedTuple):
    folder: Path
    batch: reference.Batch


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Checkpoints `infonce` and `sigmoid`, a config, and shards with and without `.json`."""
    folder = tmp_path_factory.mktemp("world")
    for name, model in (("infonce", MODEL), ("sigmoid", SIGLIP)):
        reference.make_checkpoint(model, seed=4, folder=folder / name)
    samples = {
        f"{n:02d}": {"png": picture(n, (40, 36), "PNG"), "txt": caption.encode()}
        for n, caption in enumerate(CAPTIONS)
    }
    (folder / "plain").mkdir()
    write_shard(folder / "plain/0.tar", samples)
    for key, number in zip(samples, IDS, strict=True):
        if number is not None:
            samples[key]["json"] = json.dumps({"image_id": number}).encode()
    write_shard(folder / "with_ids.tar", samples)
    config = {
        "batch": {"global": SAMPLES, "micro": 4},
        "precision": "fp32",
        "train": {"steps": 1},
        "data": {"augment": "none", "tokenizer": "openclip", "workers": 0},
        "log": {"every": 1},
        "checkpoint": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return World(folder, reference.batch_from_shards(folder / "plain", folder / "infonce"))


def expected(world: World, kind: str, kept: Tensor, smoothing: float) -> tuple[float, float]:
    """The loss over the logits that are `kept`, and the norm of all its gradients."""
    model = reference.build_model(SIGLIP if kind == "sigmoid" else MODEL)
    model.load_state_dict(reference.load_weights(world.folder / kind))
    model.double()
    images, texts, scale, *bias = model(world.batch.images.double(), world.batch.texts)
    logits = scale * images @ texts.T
    if kind == "sigmoid":
        logits = logits + bias[0]
        labels = torch.eye(SAMPLES, dtype=torch.float64)
        loss = F.binary_cross_entropy_with_logits(logits[kept], labels[kept], reduction="sum")
        loss = loss / SAMPLES
    else:
        loss = 0.0
        for matrix in (logits, logits.T):
            for own, (row, part) in enumerate(zip(matrix, kept, strict=True)):
                label = part[:own].sum()
                loss += F.cross_entropy(row[part], label, label_smoothing=smoothing) / (2 * SAMPLES)
    loss.backward()
    return loss.item(), torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


def kept_by(values: list) -> Tensor:
    """Which of the logits take part: bool [B, B]."""
    rows = [[i == j or a is None or a != b for j, b in enumerate(values)]
            for i, a in enumerate(values)]  # fmt: skip
    return torch.tensor(rows)


RUNS = {
    # processes, loss, overrides
    "plain": (1, "infonce", "tokens", ["loss.label_smoothing=0.2"]),
    "data2-sigmoid": (2, "sigmoid", "tokens", []),
    "data2-key": (2, "infonce", "key:image_id", ["loss.exchange=ring", "loss.tile=3"]),
    "tensor2-sequence": (2, "infonce", "tokens", ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline2": (
        2, "infonce", "tokens",
        ["parallel.pipeline=2", "loss.stages=all", "loss.label_smoothing=0.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_are_open_clips_with_a_mask(world, tmp_path, name):
    processes, kind, duplicates, overrides = RUNS[name]
    values = IDS if duplicates.startswith("key") else world.batch.texts.tolist()
    kept = kept_by(values)
    assert (~kept).sum() == (6 if values is IDS else 12)
    smoothing = next((float(o[21:]) for o in overrides if "smoothing" in o), 0.0)
    loss, grad_norm = expected(world, kind, kept, smoothing)
    shown = succeed(
        "train", world.folder / "config.yaml", f"run_dir={tmp_path}/run", f"loss.kind={kind}",
        f"init.from={world.folder}/{kind}", f"data.train.0.shards={world.folder}/with_ids.tar",
        f"loss.duplicates={duplicates}", *overrides, processes=processes,
    )  # fmt: skip
    assert f"duplicates left out by {duplicates}" in shown
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
    if not smoothing:
        without, _ = expected(world, kind, torch.ones_like(kept), 0.0)
        assert abs(loss - without) > 1e-3 * loss, "there is nothing to see"


def test_a_key_that_no_sample_has_ends_the_command(world, tmp_path):
    ended = run(
        "train", world.folder / "config.yaml", f"run_dir={tmp_path}/run",
        f"init.from={world.folder}/infonce", "loss.duplicates=key:imageid",
        f"data.train.0.shards={world.folder}/with_ids.tar",
    )[0]  # fmt: skip
    assert ended.code == 2 and not (tmp_path / "run").exists()
    told = "loss.duplicates key:imageid: none of the first 16 samples has a value at 'imageid'"
    assert told in ended.err
