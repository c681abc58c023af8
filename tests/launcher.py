"""Commands as a user runs them, without the wait for imports.

Each process of a command is forked from one server that has imported torch and megatron-core once
and has run nothing: as good as new, and there at once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parallel_clip.engine.launch import Launch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "parallel_clip.cli",
        "parallel_clip.training.train",
        "parallel_clip.plan.report",
        "parallel_clip.convert.openclip",
        "parallel_clip.evaluate.zero_shot",
        "parallel_clip.evaluate.retrieval",
    ]
)


class Ended(NamedTuple):
    """How one process of a command ended: its exit code (a signal: negative) and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """The processes of one command, rank 0 first."""

    processes: list
    folder: Path

    def kill(self) -> None:
        """kill -9, all ranks."""
        for process in self.processes:
            process.kill()

    def wait(self, timeout: float = 200) -> list[Ended]:
        for process in self.processes:
            process.join(timeout)
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        ended = [
            Ended(process.exitcode, *((self.folder / f"{rank}.{name}").read_text()
                                      for name in ("out", "err")))
            for rank, process in enumerate(self.processes)
        ]  # fmt: skip
        shutil.rmtree(self.folder)
        assert not late, f"ranks {late} had not ended after {timeout} s: {ended}"
        return ended


def start(
    *arguments: object,
    processes: int = 1,
    cwd: Path | None = None,
    before: Callable[[int], None] | None = None,
) -> Running:
    """Start `parallel-clip ARGUMENTS` on the CPU, in a world of so many processes.

    `before(rank)` is called in each of them first: a way to break something in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="parallel_clip_"))
    port = _free_port() if processes > 1 else None
    words = [str(argument) for argument in arguments]
    started = [
        _SERVER.Process(target=_command, args=(words, rank, processes, port, folder, cwd, before))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return Running(started, folder)


def run(*arguments: object, processes: int = 1, cwd: Path | None = None) -> list[Ended]:
    """Run `parallel-clip ARGUMENTS` to its end; how each rank ended."""
    return start(*arguments, processes=processes, cwd=cwd).wait()


def succeed(*arguments: object, processes: int = 1, cwd: Path | None = None) -> str:
    """Run a command that must end well; what rank 0 printed. The other ranks print nothing."""
    first, *others = run(*arguments, processes=processes, cwd=cwd)
    assert first.code == 0, f"exit code {first.code}: {arguments}\n{first.out}\n{first.err}"
    assert all(ended.code == 0 and not ended.out for ended in others), others
    return first.out


def _command(
    words: list[str],
    rank: int,
    world: int,
    port: int | None,
    folder: Path,
    cwd: Path | None,
    before: Callable[[int], None] | None,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if cwd is not None:
        os.chdir(cwd)

    import torch

    from parallel_clip.cli import main

    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    sys.exit(main(words))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_in_world(case: Callable[[Path, Launch], None], world: int, folder: Path) -> None:
    """Run `case(folder, launch)` in so many processes that can meet and have not yet."""
    port = _free_port()
    ranks = [
        _SERVER.Process(target=_in_world, args=(case, rank, world, port, folder))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        process.kill()


def _in_world(case: Callable, rank: int, world: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    case(folder, Launch(rank, rank, world))
