"""The key-value store through which a job's processes meet before any process group exists.

Rank 0 plans a run while it is in no process group (a dry run needs a process of its own), and hands
the plan out through this store. The others wait as long as rank 0 shows that it is alive.
"""

from __future__ import annotations

import datetime
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch.distributed as dist

from parallel_clip.engine.launch import Launch, set_rendezvous_address
from parallel_clip.errors import InputError, PeerLostError

T, K = TypeVar("T"), TypeVar("K")

# Nodes of a cluster start minutes apart.
START_TIMEOUT = datetime.timedelta(minutes=30)
HEARTBEAT = datetime.timedelta(seconds=5)
POLL_SECONDS = 0.2
SILENCE_SECONDS = 60.0  # without a heartbeat of rank 0, after which it is taken for gone

_BEAT = "parallel_clip/rank 0 is alive"
_OUTCOME = "parallel_clip/outcome of rank 0"
_READ = "parallel_clip/outcome read by rank"


@cache
def job_store(launch: Launch, timeout: datetime.timedelta = START_TIMEOUT) -> dist.Store:
    """The store of this job, made by the launcher or by rank 0. Not for a world of one.

    Raises:
        InputError: rank 0's port is taken.
    """
    set_rendezvous_address()
    try:
        store, _, _ = next(
            dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout)
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise InputError(
            f"port {os.environ['MASTER_PORT']} is in use on {os.environ['MASTER_ADDR']}, perhaps "
            "by another job; set MASTER_PORT (torchrun: --master-port) to another one"
        ) from None
    # After a restart by torchrun the store still has what the last attempt wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"parallel_clip/attempt {attempt}", store)


def broadcast_from_rank_zero(
    function: Callable[[], tuple[T, K]], launch: Launch
) -> tuple[T, K | None]:
    """Run `function` on rank 0 alone, without a process group, and hand out its result.

    `function` returns a value for all ranks, which is pickled, and one that rank 0 keeps; the
    others get None for the latter. There is no limit to how long it may take.

    Raises:
        InputError: `function` raised one; the same message on every rank.
        PeerLostError: on the other ranks, where rank 0 failed or is gone.
    """
    if launch.world_size == 1:
        return function()
    store = job_store(launch)
    if not launch.is_rank_zero:
        _wait_for_outcome(store)
        result, complaint = pickle.loads(store.get(_OUTCOME))
        store.set(f"{_READ} {launch.rank}", "")
        if complaint is not None:
            raise InputError(complaint)
        return result, None
    try:
        with _heartbeat(store):
            result, kept = function()
    except InputError as error:
        store.set(_OUTCOME, pickle.dumps((None, str(error))))
        raise
    store.set(_OUTCOME, pickle.dumps((result, None)))
    # The store may live in this process, which may have nothing more to do.
    store.wait([f"{_READ} {rank}" for rank in range(1, launch.world_size)], START_TIMEOUT)
    return result, kept


@contextmanager
def _heartbeat(store: dist.Store) -> Iterator[None]:
    """Raise a counter in the store, every few seconds, until the block is left."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT.total_seconds()):
            store.add(_BEAT, 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Listener:
    """Waits for the outcome in a thread: where the store lives in a rank 0 that is stopped, a
    request to it never returns."""

    def __init__(self, store: dist.Store):
        self.done = threading.Event()
        self.heard = time.monotonic()
        self.error: Exception | None = None
        threading.Thread(target=self._listen, args=(store,), daemon=True).start()

    def _listen(self, store: dist.Store) -> None:
        beats = 0
        try:
            while not store.check([_OUTCOME]):
                time.sleep(POLL_SECONDS)
                found = store.add(_BEAT, 0)
                if found != beats:
                    beats, self.heard = found, time.monotonic()
        except RuntimeError as error:  # the store lives with rank 0, or with its launcher
            self.error = error
        self.done.set()


def _wait_for_outcome(store: dist.Store) -> None:
    listener = _Listener(store)
    while not listener.done.wait(HEARTBEAT.total_seconds()):
        if time.monotonic() - listener.heard > SILENCE_SECONDS:
            raise PeerLostError(f"rank 0 has not been heard of for {SILENCE_SECONDS:.0f} s")
    if listener.error is not None:
        raise PeerLostError(f"rank 0 cannot be reached: {listener.error}")
