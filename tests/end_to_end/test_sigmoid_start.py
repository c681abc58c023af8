"""The sigmoid loss on weights that InfoNCE has trained: with which logit parameters it begins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import open_clip.loss
import pytest
import torch
import yaml
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.pieces import PieceReader
from parallel_clip.convert.open import open_source
from tests import reference
from tests.launcher import run, succeed
from tests.small_world import MODEL, SAMPLES, metrics, one_batch_config, state_of

STEPS = 20


class World(NamedTuple):
    """The folder of `config.yaml` and of the run `base`, by InfoNCE at a multiplier of 100; and
    the one batch of all that is trained on."""

    folder: Path
    batch: reference.Batch

    def train(self, run_dir: str, *overrides: Any, **options: Any) -> str:
        config = self.folder / "config.yaml"
        return succeed("train", config, f"run_dir={self.folder}/{run_dir}", *overrides, **options)

    def begin(self, run_dir: str, *overrides: Any, **options: Any) -> str:
        """A run of the sigmoid loss from the weights of `base`."""
        start = [f"init.from={self.folder}/base", "loss.kind=sigmoid", "optimizer.lr=3e-4"]
        return self.train(run_dir, *start, *overrides, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    config = one_batch_config(folder) | {
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-3, "clip_grad_norm": 1.0},
        "schedule": {"kind": "constant", "warmup": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    reference.make_checkpoint(MODEL, seed=1, folder=folder / "clip")
    batch = reference.batch_from_shards(folder / "train", folder / "clip")
    world = World(folder, batch)
    world.train("base", f"init.from={folder}/clip", "init.logit_scale=100", "train.steps=60")
    return world


@torch.no_grad()
def features(world: World, run_dir: str) -> tuple[Tensor, Tensor]:
    """Of the batch, by OpenCLIP's model in fp64, with the weights that a run ended with."""
    source = open_source(commit.latest(world.folder / run_dir), verify=False)
    weights = {name: source.read(name) for name in source.shapes()}
    bias = {"init_logit_bias": 0.0} if "logit_bias" in weights else {}
    model = reference.build_model(MODEL | bias)
    model.load_state_dict(weights)
    model.double()
    images, texts, *_ = model(world.batch.images.double(), world.batch.texts)
    return images, texts


def recall_and_likeness(world: World, run_dir: str) -> tuple[float, float]:
    """recall@1 of the batch, the mean of both directions; mean cosine of two pictures."""
    images, texts = features(world, run_dir)
    cosines, right = images @ texts.t(), torch.arange(SAMPLES)
    recall = sum((cosines.argmax(dim) == right).double().mean().item() for dim in (0, 1)) / 2
    alike = (images @ images.t()).sum().item() - SAMPLES
    return recall, alike / (SAMPLES * (SAMPLES - 1))


@pytest.fixture(scope="module")
def measured(world) -> str:
    """The run `measured`, which says nothing of logit parameters; what it prints."""
    return world.begin("measured")


def test_the_weights_keep_what_they_have_learnt(world, measured):
    recall, alike = recall_and_likeness(world, "base")
    assert recall > 0.95  # a pair more or less, as the processor rounds
    now, alike_now = recall_and_likeness(world, "measured")
    assert now > recall - 0.1 and alike_now < alike + 0.1


def test_with_a_bias_of_0_they_collapse(world):
    """As OpenCLIP begins: so that the test above is of a case in which something can be lost."""
    world.begin("zero", "init.logit_bias=0")
    recall, alike = recall_and_likeness(world, "zero")
    assert recall < 0.6 and alike > 0.6


def test_the_first_loss_is_the_smallest_that_open_clips_can_be(world, measured):
    images, texts = features(world, "base")
    first, scale, theirs = metrics(world.folder / "measured")[0], 100.0, open_clip.loss.SigLipLoss()
    bias = torch.tensor(first["logit_bias"], dtype=torch.float64, requires_grad=True)
    loss = theirs(images, texts, torch.tensor(scale), bias)
    loss.backward()
    assert first["logit_scale"] == pytest.approx(scale)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert abs(bias.grad) < 1e-4 < loss < theirs(images, texts, torch.tensor(scale), bias + 1)
    probabilities = (scale * images @ texts.t() + bias).sigmoid()
    assert probabilities.mean().item() == pytest.approx(1 / SAMPLES, rel=1e-3)


def test_what_is_begun_with_is_said(world, measured):
    assert "  logit_bias: measured on the first batch (the weights have none)\n" in measured
    value = metrics(world.folder / "measured")[0]["logit_bias"]
    assert measured.count(f"logit_bias measured on the first batch: {value:.4g}\n") == 1
    given = ["init.logit_scale=20", "init.logit_bias=-4.5"]
    said = world.begin("never", *given, "--dry-run")
    assert "  logit_scale: 20, by init.logit_scale\n" in said
    assert "  logit_bias: -4.5, by init.logit_bias\n" in said and "measured" not in said
    assert not (world.folder / "never").exists()


def test_two_data_ranks_and_their_averages_begin_with_it(world, measured):
    """And with the multiplier that is given; a resumed run measures no more."""
    options = ["init.logit_scale=50", "ema.decay=0.9", "optimizer.lr_logit=0", "log.every=1"]
    world.begin("two", *options, "train.steps=2", processes=2)
    said = world.begin("two", *options, "train.steps=3", processes=2)
    assert "measured" not in said
    lines = metrics(world.folder / "two")
    assert {line["logit_bias"] for line in lines} == {lines[0]["logit_bias"]}
    assert lines[0]["logit_scale"] == pytest.approx(50)
    images, texts = features(world, "base")
    logits = 50 * images @ texts.t() + lines[0]["logit_bias"]
    assert logits.sigmoid().sum().item() == pytest.approx(SAMPLES, rel=1e-3)
    reader = PieceReader(commit.latest(world.folder / "two"))
    assert reader.read("ema:logit_bias").item() == pytest.approx(lines[0]["logit_bias"])


def test_a_run_that_was_stopped_before_its_first_step_measures_when_it_goes_on(world, measured):
    said = world.begin("stopped", "train.time_limit=0.001")
    assert "stopped after step 0" in said and "logit_bias measured" not in said
    said = world.begin("stopped")
    assert "goes on from" in said and "logit_bias measured on the first batch" in said
    first, again = (metrics(world.folder / name)[0] for name in ("measured", "stopped"))
    assert again["logit_bias"] == first["logit_bias"] and again["loss"] == first["loss"]


def test_random_weights_can_be_measured_and_are_not_by_themselves(world):
    model = [f"model.name={world.folder}/model.json", "loss.kind=sigmoid", "train.steps=1"]
    model += ["optimizer.lr=0", *(f"data.{key}={v}" for key, v in reference.PREPROCESS.items())]
    world.train("random", *model)
    world.train("random measured", *model, "init.logit_bias=measured", "init.logit_scale=30")
    usual, asked = (metrics(world.folder / name)[0] for name in ("random", "random measured"))
    assert (usual["logit_scale"], usual["logit_bias"]) == (pytest.approx(10), -10)
    assert asked["logit_scale"] == pytest.approx(30)
    images, texts = features(world, "random measured")
    probabilities = (30 * images @ texts.t() + asked["logit_bias"]).sigmoid()
    assert probabilities.mean().item() == pytest.approx(1 / SAMPLES, rel=1e-3)


WRONG = {
    "init.logit_bias=-10": ([], "init.logit_bias -10.* is for loss.kind sigmoid"),
    "init.logit_bias=measured": ([], "init.logit_bias measured is for loss.kind sigmoid"),
    "init.logit_scale=200": ([], "init.logit_scale is 200; expected number ≥ 1 and ≤ 100 or null"),
    "init.logit_bias=fit": (["loss.kind=sigmoid"], 'logit_bias is "fit"; expected measured or num'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_means_nothing_is_refused(world, wrong):
    more, told = WRONG[wrong]
    words = [f"run_dir={world.folder}/wrong", f"init.from={world.folder}/base", wrong, *more]
    (ended,) = run("train", world.folder / "config.yaml", *words)
    assert ended.code == 2 and re.search(told, ended.err), ended.err
    assert not (world.folder / "wrong").exists()


def test_a_converted_run_folder_is_begun_from_and_not_resumed(world):
    """It has no bias, and a run in it would resume."""
    folder = world.folder / "converted"
    succeed("convert", world.folder / "base", folder, "--to", "run")
    before = state_of(folder)
    words = ["train", world.folder / "config.yaml", f"run_dir={folder}", "loss.kind=sigmoid"]
    for more, told in ([], "train from them with init.from"), (
        ["init.logit_bias=-10"], f"init.from={folder} where its weights are meant"
    ):  # fmt: skip
        (ended,) = run(*words, *more)
        assert ended.code == 2 and told in ended.err, ended.err
    assert state_of(folder) == before
