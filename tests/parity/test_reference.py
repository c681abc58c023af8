"""The reference by itself: what it must be blind to, and what it must see."""

import math

import pytest
import torch

from tests.parity.models import MODELS
from tests.reference import (
    Batch,
    FedPatchDropout,
    batch_from_shards,
    build_model,
    cosine,
    make_checkpoint,
    make_shards,
    reference_run,
)

STEPS = 20
OPTIMIZER = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def prepare(folder, name):
    weights = make_checkpoint(MODELS[name], seed=1, folder=folder / "checkpoint")
    make_shards(folder / "shards", samples=16, image_size=32, seed=2)
    return weights, batch_from_shards(folder / "shards", folder / "checkpoint")


def run(name, weights, batch, **changes):
    arguments = {"steps": STEPS, "learning_rate": cosine(1e-3, 4, STEPS), **OPTIMIZER, **changes}
    return reference_run(MODELS[name], weights, batch, **arguments)


def relative(a, b):
    flat_a, flat_b = (torch.cat([x[n].flatten() for n in sorted(x)]).double() for x in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


def test_the_batch_is_what_was_written(tmp_path):
    _, batch = prepare(tmp_path, "clipa")
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.texts.shape == (16, 32)
    assert [sample.key for sample in batch.samples] == [f"{i:05d}" for i in range(16)]
    assert [sample.shard for sample in batch.samples] == ["000000.tar"] * 8 + ["000001.tar"] * 8
    assert len({tuple(row) for row in batch.texts.tolist()}) == 16
    assert batch.images.flatten(1).std(dim=1).min() > 0.05


@pytest.mark.parametrize("name", ["plain", "siglip"])
def test_blind_to_the_order_of_the_batch(tmp_path, name):
    """As far as fp32 goes, by the tolerances that training is held to."""
    weights, batch = prepare(tmp_path, name)
    loss = "sigmoid" if name == "siglip" else "infonce"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    samples = [batch.samples[i] for i in order]
    permuted = Batch(batch.images[order], batch.texts[order], samples)
    first = run(name, weights, batch, loss=loss)
    second = run(name, weights, permuted, loss=loss)
    for a, b in zip(first.steps, second.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=3e-5)
    assert relative(first.weights, second.weights) < 1e-5
    assert relative(first.weights, weights) > 1e-3
    assert first.steps[-1]["loss"] < 0.9 * first.steps[0]["loss"]


def test_records_are_what_the_step_used(tmp_path):
    weights, batch = prepare(tmp_path, "quickgelu-layerscale")
    records = run("quickgelu-layerscale", weights, batch, steps=5).steps
    assert records[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    assert [r["lr"] for r in records] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert records[0]["logit_bias"] is None


def test_clipping_changes_the_weights_and_not_the_recorded_norm(tmp_path):
    weights, batch = prepare(tmp_path, "six-heads")
    free = run("six-heads", weights, batch, steps=3)
    clipped = run("six-heads", weights, batch, steps=3, clip_grad_norm=0.01)
    assert clipped.steps[0]["grad_norm"] == free.steps[0]["grad_norm"] > 0.01
    assert relative(clipped.weights, free.weights) > 1e-6


def test_logit_scale_is_clamped(tmp_path):
    weights, batch = prepare(tmp_path, "three-heads")
    weights["logit_scale"] = torch.tensor(math.log(100) - 1e-4)
    last = run("three-heads", weights, batch, steps=3, learning_rate=lambda step: 0.1).steps[-1]
    assert last["logit_scale"] <= 100 * (1 + 1e-6)


def test_fed_patch_dropout_keeps_the_named_patches(tmp_path):
    """All patches named: no dropout; one patch named: the picture of that patch alone."""
    name = "patch-dropout"
    weights, batch = prepare(tmp_path, name)
    model = build_model(MODELS[name])
    model.load_state_dict(weights)
    whole = model.eval().visual(batch.images[:4])
    model.train().visual.patch_dropout = FedPatchDropout()
    model.visual.patch_dropout.kept = torch.arange(25).expand(4, -1)
    torch.testing.assert_close(model.visual(batch.images[:4]), whole)

    model.visual.patch_dropout.kept = torch.tensor([[7]] * 4)
    only_one = batch.images[:4].clone()
    row, column = divmod(7, 5)
    rest = torch.ones(30, 30, dtype=torch.bool)
    rest[row * 6 : row * 6 + 6, column * 6 : column * 6 + 6] = False
    before = model.visual(only_one)
    only_one[:, :, rest] = 0.0
    torch.testing.assert_close(model.visual(only_one), before)


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_bf16_is_near_and_not_equal(tmp_path, precision):
    weights, batch = prepare(tmp_path, "plain")
    exact = run("plain", weights, batch, steps=3)
    rounded = run("plain", weights, batch, steps=3, precision=precision)
    for a, b in zip(rounded.steps, exact.steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-2)
        assert a["loss"] != b["loss"]
