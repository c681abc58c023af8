"""`data.captions_per_image` in the train command, against open_clip's model in one process with the
loss in plain torch (tests/loss/test_captions.py).

The data is one global batch: each step sees the same pictures, in an order to which the loss is
blind.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from parallel_clip.checkpoint import commit
from tests import reference
from tests.data.shard_files import picture, write_shard
from tests.launcher import run, succeed
from tests.loss import test_captions
from tests.small_models import small_model
from tests.small_world import ledger, metrics, tensors

PICTURES, STEPS, LR = 12, 3, 1e-3
MODEL = small_model(text={"vocab_size": 49408, "context_length": 9})
SIGLIP = MODEL | {"init_logit_scale": 1.2, "init_logit_bias": -2.0}
# The first has one caption alone, and pictures next to each other have one in common.
WORDS = [*reference.COLOURS, "black", "brown", "gold"]
CAPTIONS = [
    [f"a {WORDS[n]} ring", f"a {WORDS[n + 1]} ring", f"number {n}"] for n in range(PICTURES)
]
CAPTIONS[0] = CAPTIONS[0][:1]


class World(NamedTuple):
    folder: Path
    batch: reference.Batch  # its texts, a caption a picture, are not used


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    for name, model in (("infonce", MODEL), ("sigmoid", SIGLIP)):
        reference.make_checkpoint(model, seed=4, folder=folder / name)
    samples = {
        f"{n:02d}": {"png": picture(n, (40, 36), "PNG"), "txt": "\n".join(lines).encode()}
        for n, lines in enumerate(CAPTIONS)
    }
    (folder / "shards").mkdir()
    write_shard(folder / "shards/0.tar", samples)
    config = {
        "batch": {"global": PICTURES, "micro": 3},
        "precision": "fp32",
        "train": {"steps": STEPS},
        "optimizer": {"lr": LR},
        "schedule": {"kind": "constant", "warmup": 0},
        "data": {
            "train": [{"shards": str(folder / "shards")}],
            "augment": "none",
            "caption_lines": True,
            "tokenizer": "openclip",
            "workers": 0,
        },
        "log": {"every": 1, "ledger": True},
        "checkpoint": {"every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return World(folder, reference.batch_from_shards(folder / "shards", folder / "infonce"))


class Case(NamedTuple):
    kind: str
    captions: int
    processes: int
    overrides: list[str]
    freeze: dict[str, str] = {}

    @property
    def smoothing(self) -> float:
        options = dict(override.split("=", 1) for override in self.overrides)
        return float(options.get("loss.label_smoothing", 0))


DUPLICATES = "loss.duplicates=tokens"
CASES = {
    "data2-ring": Case(
        "infonce", 2, 2,
        [DUPLICATES, "loss.label_smoothing=0.1", "loss.exchange=ring", "loss.tile=4"],
    ),
    "pipeline2": Case(
        "sigmoid", 3, 2, ["parallel.pipeline=2", "loss.stages=all", "parallel.stash=1"]
    ),
}  # fmt: skip
CASES_MORE = {
    "plain": Case("infonce", 2, 1, []),
    "plain-sigmoid": Case("sigmoid", 4, 1, [DUPLICATES, "batch.micro=12"]),
    "data2-sigmoid": Case("sigmoid", 2, 2, ["loss.tile=5", DUPLICATES]),
    "tensor2-sequence": Case(
        "infonce", 3, 2,
        ["parallel.tensor=2", "parallel.sequence=true", DUPLICATES, "recompute=full"],
    ),
    "tensor2-sigmoid": Case("sigmoid", 2, 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline2-two-pass": Case(
        "infonce", 2, 2, ["parallel.pipeline=2", "parallel.stash=0", "loss.label_smoothing=0.2"]
    ),
    "pipeline2-virtual2": Case(
        "infonce", 2, 2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", DUPLICATES]
    ),
    "data2-tensor2-pipeline2": Case(
        "infonce", 3, 8, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]
    ),
    "text-frozen": Case(
        "infonce", 3, 2, ["parallel.pipeline=2", "parallel.stash=0", "freeze.text=all"],
        {"text": "all"},
    ),
    "vision-frozen": Case(
        "infonce", 2, 2, ["parallel.pipeline=2", "parallel.stash=2", "freeze.vision=all"],
        {"vision": "all"},
    ),
}  # fmt: skip


def expected(world: World, case: Case) -> reference.Reference:
    """A picture with fewer captions has them again from the first on."""
    used = [own[j % len(own)] for own in CAPTIONS for j in range(case.captions)]
    texts = reference.open_clip.SimpleTokenizer(context_length=9)(used)
    kept = takes_part(texts.view(PICTURES, case.captions, -1), DUPLICATES in case.overrides)
    loss = partial(test_captions.infonce, case.smoothing, kept, bias=None)
    if case.kind == "sigmoid":
        loss = partial(test_captions.sigmoid, kept)
    return reference.reference_run(
        SIGLIP if case.kind == "sigmoid" else MODEL,
        reference.load_weights(world.folder / case.kind),
        world.batch._replace(texts=texts),
        steps=STEPS,
        learning_rate=lambda step: LR,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        loss=loss,
        freeze=case.freeze,
    )


def takes_part(texts_of_pictures: Tensor, without_duplicates: bool) -> Tensor:
    """Which logits take part: bool [B, B·k]. No duplicate: the text of another picture that is
    none of a picture's own."""
    rows = texts_of_pictures.tolist()
    kept = [
        [
            i == j or not without_duplicates or text not in own
            for j, of in enumerate(rows)
            for text in of
        ]
        for i, own in enumerate(rows)
    ]
    return torch.tensor(kept)


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.parity) for name in CASES_MORE)]
)
def test_a_run_is_open_clips_with_several_texts_a_picture(world, tmp_path, name):
    case = (CASES | CASES_MORE)[name]
    shown = succeed(
        "train", world.folder / "config.yaml", f"run_dir={tmp_path}/run", f"loss.kind={case.kind}",
        f"init.from={world.folder}/{case.kind}", f"data.captions_per_image={case.captions}",
        *case.overrides, processes=case.processes,
    )  # fmt: skip
    assert f", each with {case.captions} captions;" in shown
    wanted = expected(world, case).steps
    for number, (ours, theirs) in enumerate(zip(metrics(tmp_path / "run"), wanted, strict=True)):
        tolerance = 1e-5 if number == 0 else 1e-4
        for key in ("loss", "grad_norm", "logit_scale"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (number, key)
        assert ours["samples_seen"] == (number + 1) * PICTURES


def test_a_stopped_run_goes_on_with_the_same_bits(world, tmp_path):
    """Captions are drawn, and pictures cropped, by position."""
    words = [
        "train", world.folder / "config.yaml", f"init.from={world.folder}/infonce",
        "data.captions_per_image=2", "data.augment=train", DUPLICATES, "checkpoint.every=1",
        "batch.global=6", "data.workers=1",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*words, f"run_dir={whole}", "train.steps=3")
    succeed(*words, f"run_dir={parts}", "train.steps=2")
    (ended,) = run(*words, f"run_dir={parts}", "train.steps=3", "data.captions_per_image=3")
    assert ended.code == 2 and "data.captions_per_image: 2 → 3" in ended.err
    succeed(*words, f"run_dir={parts}", "train.steps=3")
    assert tensors(commit.latest(whole)) == tensors(commit.latest(parts))
    assert [m["loss"] for m in metrics(whole)] == [m["loss"] for m in metrics(parts)]
    assert ledger(whole) == ledger(parts)


def test_where_every_sample_has_one_caption_the_command_ends(world, tmp_path):
    words = "train", world.folder / "config.yaml", f"run_dir={tmp_path}/run"
    words += f"init.from={world.folder}/infonce", "data.captions_per_image=2"
    (ended,) = run(*words, "data.caption_lines=false")
    assert ended.code == 2 and not (tmp_path / "run").exists()
    assert "data.captions_per_image 2 is for samples with several captions" in ended.err
