"""Real processes for the tests of what happens between ranks.

Importing torch and megatron-core takes seconds, so the processes are started once a session and
each runs one case after another: a module-level function `case(groups, **arguments)` on every rank
of a layout, in process groups of its own. Cases live in modules that do not import open_clip, which
the ranks have no need of.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parallel_clip.layout import Layout

GRACE = 3.0  # seconds that the other ranks have to say how they failed, once one has


class Processes:
    """As many gloo processes as the largest layout asked of it; rank i is process i."""

    def __init__(self):
        self._spawn = multiprocessing.get_context("spawn")
        self._running: dict[int, tuple[multiprocessing.Process, Connection]] = {}

    def run(
        self, layout: Layout, case: Callable[..., Any], *, seconds: float = 240, **arguments: Any
    ) -> list[Any]:
        """What `case(groups, **arguments)` returns on each rank of the layout.

        A case that raises on any rank, or that takes longer than `seconds`, fails the test with
        the traceback of each rank that has one.
        """
        for rank in set(range(layout.world)) - self._running.keys():
            self._start(rank)
        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        try:
            # Tensors by value: torch's own way through a pipe shares memory between processes.
            job = pickle.dumps((layout, folder / "meet", case, arguments))
            for rank in range(layout.world):
                self._running[rank][1].send_bytes(job)
            results, complaints = self._collect(layout.world, seconds)
        finally:
            shutil.rmtree(folder)
        if complaints:
            shown = "\n".join(f"--- rank {rank}\n{text}" for rank, text in complaints.items())
            pytest.fail(f"{case.__name__} on {layout}\n{shown}", pytrace=False)
        return [results[rank] for rank in range(layout.world)]

    def close(self) -> None:
        for rank in list(self._running):
            self._stop(rank)

    def _start(self, rank: int) -> None:
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=_serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        self._running[rank] = process, ours

    def _stop(self, rank: int) -> None:
        process, pipe = self._running.pop(rank)
        process.kill()
        process.join()
        pipe.close()

    def _collect(self, world: int, seconds: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results and complaints by rank; a rank that says nothing in time is stopped."""
        results: dict[int, Any] = {}
        complaints: dict[int, str] = {}
        waiting = {self._running[rank][1]: rank for rank in range(world)}
        deadline = time.monotonic() + seconds
        while waiting:
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    complaint, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    complaint, result = "the process died", None
                    self._stop(rank)
                if complaint is None:
                    results[rank] = result
                elif not complaints:
                    deadline = min(deadline, time.monotonic() + GRACE)
                if complaint is not None:
                    complaints[rank] = complaint
        for rank in waiting.values():
            complaints[rank] = "still running: waits for another rank, or is too slow"
            self._stop(rank)
        return results, complaints


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one GPU cannot be several ranks
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            layout, meeting_file, case, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = None, _run(layout, rank, meeting_file, case, arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))
        # Models are in cycles of references and hold their groups, each of which has a thread of
        # gloo's that wakes up a hundred times a second.
        del answer
        gc.collect()
        gc.freeze()  # what is left are imports; the next collection need not look at them


def _run(layout: Layout, rank: int, meeting_file: Path, case: Callable, arguments: dict) -> Any:
    import torch
    import torch.distributed as dist

    from parallel_clip.engine.groups import close_groups, join_world, make_groups
    from parallel_clip.engine.launch import Launch

    torch.manual_seed(0)
    # `join_world` takes the world that it finds; a file to meet in needs no port.
    store = dist.FileStore(str(meeting_file), layout.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world)
    try:
        join_world(Launch(rank, rank, layout.world))
        return case(make_groups(layout), **arguments)
    finally:
        close_groups()
