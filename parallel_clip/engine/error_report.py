"""Report an error that every rank has once, on rank 0, before any rank exits.

torchrun ends all processes as soon as one of them has ended. A rank that found an error first would
take rank 0 down before it could print anything.
"""

from __future__ import annotations

import datetime
import sys

from parallel_clip.engine.launch import Launch
from parallel_clip.errors import PeerLostError

RANK_ZERO_TIMEOUT = datetime.timedelta(seconds=30)

# What gloo and NCCL say where the other end of a connection is gone.
_LOST = (
    "closed by peer", "reset by peer", "Broken pipe",
    "ncclRemoteError", "NCCL communicator was aborted", "remote process exited",
    "Watchdog caught collective operation timeout",
)  # fmt: skip


def report_error_once(message: str, launch: Launch) -> None:
    """Print an error that every rank has, on rank 0 alone. Where rank 0 does not report one within
    `RANK_ZERO_TIMEOUT`, this rank prints it itself."""
    if launch.is_rank_zero:
        print(message, file=sys.stderr, flush=True)
    if launch.world_size > 1 and not _wait_for_rank_zero(launch):
        print(f"{message} (rank {launch.rank})", file=sys.stderr, flush=True)


def is_lost_connection(error: Exception) -> bool:
    """Whether this rank fails only because another one ended. Its traceback would bury the other's,
    and there may be a hundred of it."""
    if isinstance(error, PeerLostError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _wait_for_rank_zero(launch: Launch) -> bool:
    """Whether rank 0 has printed its message, as far as can be known; True on rank 0 itself."""
    import torch.distributed as dist

    from parallel_clip.engine.rendezvous import job_store

    key = "parallel_clip/rank 0 has said it"
    try:
        store = job_store(launch, RANK_ZERO_TIMEOUT)
        heard = [f"{key}, rank {rank} heard" for rank in range(launch.world_size)]
        if launch.is_rank_zero:  # the store may live in this process: not gone before it was heard
            store.set(key, "")
            store.wait(heard[1:], RANK_ZERO_TIMEOUT / 10)
        else:
            store.wait([key], RANK_ZERO_TIMEOUT)
            store.set(heard[launch.rank], "")
    except dist.DistStoreError:  # RANK_ZERO_TIMEOUT is over
        return launch.is_rank_zero
    except Exception:  # the store lives with rank 0 or its launcher, and ended with them
        return True
    return True
