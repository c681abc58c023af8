"""The same code on a CUDA device: a few training steps beside OpenCLIP's on the CPU."""

import pytest
import torch

from parallel_clip.engine.groups import close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout
from tests import reference
from tests.small_models import distance, image_batch, small_model, token_batch
from tests.training.step_cases import Task, train

pytestmark = pytest.mark.gpu

MODEL = small_model({"ls_init_value": 0.3})
BATCH, STEPS, LR = 8, 5, 1e-3


@pytest.fixture
def groups():
    layout = Layout(1)
    join_world(Launch(0, 0, 1))
    yield make_groups(layout)
    close_groups()


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "whole"])
def test_steps_in_fp32_are_openclips(groups, recompute, microbatches, zero):
    records, weights, expected = run(
        groups, "fp32", recompute=recompute, microbatches=microbatches, zero=zero
    )
    for ours, theirs in zip(records, expected.steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, tensor in weights.items():
        if not name.endswith("in_proj_bias"):  # the key's third is moved by rounding alone
            assert distance(tensor, expected.weights[name]) < 1e-3, name


def test_steps_in_bf16_are_near(groups):
    records, weights, expected = run(groups, "bf16", recompute="none", microbatches=2, zero=True)
    assert weights["logit_scale"].dtype == torch.float32
    for ours, theirs in zip(records, expected.steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def run(groups, precision: str, recompute: str, microbatches: int, zero: bool):
    images, tokens = image_batch(MODEL, BATCH), token_batch(MODEL, BATCH)
    start = reference.random_weights(MODEL, seed=8)
    settings = {
        "precision": precision,
        "recompute": recompute,
        "parallel": {"distributed_optimizer": zero},
    }
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    task = Task(MODEL, start, images.to(groups.device, dtype), tokens.to(groups.device), settings)
    records, weights = train(groups, task, steps=STEPS, lr=LR, microbatches=microbatches)
    expected = reference.reference_run(
        MODEL,
        start,
        reference.Batch(images, tokens, []),
        steps=STEPS,
        learning_rate=lambda step: LR,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
    )
    return records, {name: tensor.cpu() for name, tensor in weights.items()}, expected
