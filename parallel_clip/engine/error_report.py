"""One message for all ranks: rank 0 says what ended the run, the others stay until it has.

torchrun ends all processes as soon as one of them has ended. A rank that found an error first would
take rank 0 down before it could say anything.
"""

from __future__ import annotations

import datetime
import sys

from parallel_clip.engine.launch import Launch, set_rendezvous_address

RANK_ZERO_TIMEOUT = datetime.timedelta(seconds=30)

# What gloo says of a connection whose other end is gone.
_LOST = ("closed by peer", "reset by peer", "Broken pipe")


def report_error_once(message: str, launch: Launch) -> None:
    """Print the error that every rank has, on rank 0 alone. A rank that has an error which rank 0
    does not come with, in `RANK_ZERO_TIMEOUT`, prints it itself."""
    if launch.is_rank_zero:
        print(message, file=sys.stderr, flush=True)
    if launch.world_size > 1 and not _wait_for_rank_zero(launch):
        print(f"{message} (rank {launch.rank})", file=sys.stderr, flush=True)


def is_lost_connection(error: Exception) -> bool:
    """Whether this rank fails only because another one ended. Its traceback would bury the other's,
    and there may be a hundred of it."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _wait_for_rank_zero(launch: Launch) -> bool:
    """Whether rank 0 has spoken, as far as can be known; True on rank 0 itself."""
    import torch.distributed as dist

    key = "parallel_clip/rank 0 has said it"
    try:
        set_rendezvous_address()
        store, _, _ = next(
            dist.rendezvous("env://", launch.rank, launch.world_size, timeout=RANK_ZERO_TIMEOUT)
        )
        heard = [f"{key}, rank {rank} heard" for rank in range(launch.world_size)]
        if launch.is_rank_zero:  # the store may live in this process: not gone before it was heard
            store.set(key, "")
            store.wait(heard[1:], RANK_ZERO_TIMEOUT / 10)
        else:
            store.wait([key], RANK_ZERO_TIMEOUT)
            store.set(heard[launch.rank], "")
    except dist.DistStoreError:  # PATIENCE is over
        return launch.is_rank_zero
    except Exception:  # the store lives with rank 0 or its launcher, and ended with them
        return True
    return True
