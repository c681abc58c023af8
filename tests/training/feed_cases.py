"""What ranks do in test_feed.py."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from parallel_clip.data.feeding.training_data import Microbatch
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import plan_batch
from parallel_clip.loss import ClipLoss
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch
from parallel_clip.pipeline.forward_backward import forward_backward
from parallel_clip.pipeline.inputs import StepInputs
from parallel_clip.training.feed import DeviceFeed
from tests.ranks import Weights, config_of, loaded_training, own_microbatches


class Feeding(NamedTuple):
    """Of one step on one rank: the microbatches whose pictures were fetched, the most of them on
    the device at once, how many are there at the end; whether loss and gradients have the bits of a
    step whose pictures were all there from the start."""

    fetched: list[int]
    most_held: int
    left: int
    same_bits: bool


def feed_a_step(
    groups: Groups,
    model_cfg: dict[str, Any],
    weights: Weights,
    images: Tensor,
    tokens: Tensor,
    micro: int,
    stash: int,
) -> Feeding:
    """Pictures are bf16 and the model fp32: what graphs keep are copies, and only the feed and the
    running forward hold the pictures themselves."""
    config = config_of(groups.layout, parallel={"distributed_optimizer": False})
    architecture = architecture_from_json(model_cfg, "small")
    built = loaded_training(groups, config, architecture, weights)
    loss = ClipLoss(group=groups.data)

    def gradients(inputs: StepInputs) -> list[Tensor]:
        built.optimizer.zero_grad()
        report = forward_backward(built.wrapped, inputs, loss, stash)
        return [report.value, *(t.main_grad.clone() for _, t in built.global_parameters())]

    plan = plan_batch(groups.layout, len(tokens), micro)
    count = plan.microbatches
    vision = architecture.vision
    kept = kept_patches_of_batch(0, 1, range(len(tokens)), vision.patches, vision.patches_kept)
    inputs = own_microbatches(groups, images.bfloat16(), tokens, count, torch.from_numpy(kept))
    expected = gradients(inputs)

    read = [
        Microbatch(*parts, addresses=[], bad=[])
        for parts in zip(
            images.chunk(count),
            tokens.chunk(count),
            torch.arange(len(tokens)).chunk(count),
            strict=True,
        )
    ]
    loader = [read] if groups.reads_data else None
    feed = DeviceFeed(loader, architecture, plan, groups, torch.bfloat16, seed=0)
    fetched: list[int] = []
    held: weakref.WeakSet = weakref.WeakSet()
    most_held = 0
    share = feed._share_pictures

    def watched(step: int, read: list[Microbatch], ahead: dict, number: int):
        nonlocal most_held
        pictures = share(step, read, ahead, number)
        fetched.append(number)
        held.add(pictures.images)
        most_held = max(most_held, len(held))
        return pictures

    with mock.patch.object(feed, "_share_pictures", watched):
        (batch,) = feed.batches(0, 1)
    found = gradients(batch.inputs)
    same = all(map(torch.equal, expected, found))
    return Feeding(fetched, most_held, len(held), same)
