"""What ranks do in test_groups.py and test_processes.py."""

import os
import time

import torch
import torch.distributed as dist

from parallel_clip.engine.groups import Groups
from parallel_clip.errors import InputError


def place(groups: Groups) -> dict:
    """Where this rank stands, and the sum of all ranks over each of its groups."""
    sums = {}
    for name in ("world", "tensor", "data", "pipeline"):
        total = torch.tensor(groups.rank, device=groups.device)
        dist.all_reduce(total, group=getattr(groups, name))
        sums[name] = int(total)
    return {
        "rank": groups.rank,
        "coordinates": (groups.data_rank, groups.tensor_rank, groups.pipeline_rank),
        "sums": sums,
    }


def say(groups: Groups, word: str) -> str:
    return f"{groups.rank} of {groups.layout.world}: {word}"


def fail_alone(groups: Groups, rank: int) -> None:
    """One rank fails while the others wait for it."""
    if groups.rank == rank:
        raise ArithmeticError("no such number")
    dist.barrier()


def wait_alone(groups: Groups, rank: int) -> None:
    if groups.rank == rank:
        time.sleep(3600)


def die(groups: Groups, rank: int) -> None:
    if groups.rank == rank:
        os._exit(1)


def complain_everywhere(groups: Groups, wrong: list[int]) -> str:
    def check() -> str:
        if groups.rank in wrong:
            raise InputError(f"rank {groups.rank} found it")
        return f"rank {groups.rank} is content"

    try:
        return groups.run_on_all_ranks(check)
    except InputError as error:
        return f"InputError: {error}"


def ask_rank_zero(groups: Groups, wrong: bool) -> str:
    def check() -> str:
        if wrong:
            raise InputError(f"found by rank {groups.rank}")
        return f"said by rank {groups.rank}"

    try:
        return groups.run_on_rank_zero(check)
    except InputError as error:
        return f"InputError: {error}"
