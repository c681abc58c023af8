"""Collectives over a process group that is handed in; None stands for this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.errors import InputError


def broadcast_from_last_stage(values: Tensor, pipeline_group: ProcessGroup) -> Tensor:
    """Overwrite `values` with the last stage's, of the same shape and dtype; returns it."""
    stages = pipeline_group.size()
    if stages > 1:
        dist.broadcast(values, dist.get_global_rank(pipeline_group, stages - 1), pipeline_group)
    return values


def gather_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Concatenate the rows [n, ...] of all ranks in the order of ranks; n may differ, or be 0."""
    if group is None:
        return rows
    counts = gather_objects(len(rows), group)
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def gather_objects(mine: object, group: ProcessGroup | None) -> list:
    """A picklable object from every rank, in the order of ranks."""
    if group is None:
        return [mine]
    everyones: list = [None] * group.size()
    dist.all_gather_object(everyones, mine, group=group)
    return everyones


@contextmanager
def raise_on_all_ranks(group: ProcessGroup | None) -> Iterator[None]:
    """Raise the InputError that any rank meets inside on all ranks, once all have left the block.

    A rank that ended alone would leave the others waiting for it in their next collective. Where
    several ranks meet one, the lowest rank's is raised.
    """
    complaint = None
    try:
        yield
    except InputError as error:
        complaint = str(error)
    for found in gather_objects(complaint, group):
        if found is not None:
            raise InputError(found)
