"""What ranks do in test_drop_in.py: someone's own OpenCLIP script, and its mistakes."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parallel_clip.engine.groups import Groups


def train_open_clip(
    groups: Groups,
    ours: type[nn.Module] | None,
    model_cfg: dict[str, Any],
    weights: dict[str, Tensor],
    images: Tensor,
    tokens: Tensor,
    steps: int,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of open_clip's model under DDP; `ours` None: with its own loss."""
    import open_clip.loss
    import torch.distributed.nn

    from tests.reference import build_model

    ranks, rank = groups.layout.data, groups.data_rank
    model = build_model(model_cfg)
    model.load_state_dict(weights)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.1)
    loss = ours() if ours else open_clip.loss.ClipLoss(True, True, rank=rank, world_size=ranks)
    # Its default group is the world at import: here, that of an earlier case.
    gather = partial(torch.distributed.nn.all_gather, group=dist.group.WORLD)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with mock.patch.object(torch.distributed.nn, "all_gather", gather):
            value = loss(*ddp(images.chunk(ranks)[rank], tokens.chunk(ranks)[rank]))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, model.state_dict()


def with_such_shapes(
    groups: Groups, loss: type[nn.Module], shapes: list[tuple[int, int]]
) -> list[str]:
    """The error when rank i holds features of shapes[i], and when it comes a second time."""
    features = F.normalize(torch.ones(shapes[groups.rank]), dim=-1)
    module = loss()
    return [_complaint(lambda: module(features, features, 10.0)) for _ in range(2)]


def identities_on_rank_one(groups: Groups, loss: type[nn.Module]) -> str:
    """The error, if any, when that rank alone has identities."""
    features = F.normalize(torch.ones(4, 8), dim=-1)
    identities = torch.arange(4) if groups.rank == 1 else None
    return _complaint(lambda: loss()(features, features, 10.0, identities=identities))


def in_a_group_of_rank_zero(groups: Groups, loss: type[nn.Module]) -> str:
    """The error, if any, with a group that holds rank 0 only."""
    alone = dist.new_group([0])
    features = F.normalize(torch.ones(3, 8), dim=-1)
    return _complaint(lambda: loss(group=alone)(features, features, 10.0))


def at_a_place(groups: Groups, loss: type[nn.Module], off: int, world_size: int) -> str:
    """The error, if any, when told a rank that is so far off, and this world size."""
    features = F.normalize(torch.ones(3, 8), dim=-1)
    module = loss(rank=groups.rank + off, world_size=world_size)
    return _complaint(lambda: module(features, features, 10.0))


def _complaint(function) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""
