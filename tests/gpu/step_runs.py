"""Twenty steps of a small model on the device, and OpenCLIP's of it on the CPU."""

from __future__ import annotations

import functools

import torch

from parallel_clip.engine.groups import Groups
from tests import reference
from tests.small_models import image_batch, small_model, token_batch
from tests.training.step_cases import Task, train

MODEL = small_model({"ls_init_value": 0.3})
BATCH, MICROBATCHES, STEPS, LR = 8, 4, 20, 1e-3
OPTIMIZER = {"lr": LR, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def task_on(groups: Groups, precision: str, recompute: str, schedule: str) -> Task:
    """The run as a task of tests/training/step_cases.py, its batch on the device of `groups`."""
    images, tokens = image_batch(MODEL, BATCH), token_batch(MODEL, BATCH)
    settings = {
        "precision": precision,
        "recompute": recompute,
        "parallel": {"schedule": schedule},
        "optimizer": OPTIMIZER,
    }
    images = images.to(groups.device, DTYPES[precision])
    weights = reference.random_weights(MODEL, seed=8)
    return Task(MODEL, weights, images, tokens.to(groups.device), settings)


def run(
    groups: Groups, precision: str, recompute: str = "none", schedule: str = "stash"
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The record of each step, and the weights by name after the last, on the CPU."""
    task = task_on(groups, precision, recompute, schedule)
    records, weights = train(groups, task, STEPS, LR, MICROBATCHES)
    return records, {name: tensor.cpu() for name, tensor in weights.items()}


@functools.cache
def expected(precision: reference.Precision) -> reference.Reference:
    """OpenCLIP's run on the CPU, the whole batch at once."""
    return reference.reference_run(
        MODEL,
        reference.random_weights(MODEL, seed=8),
        reference.Batch(image_batch(MODEL, BATCH), token_batch(MODEL, BATCH), []),
        steps=STEPS,
        learning_rate=lambda step: LR,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.2,
        precision=precision,
    )
