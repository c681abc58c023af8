"""Rank 0 finds something out before any process group exists, and hands it to the others."""

import os
import signal
import time
from pathlib import Path

import pytest

from parallel_clip.engine import rendezvous
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError, PeerLostError
from tests.launcher import run_in_world


def _attempt(folder: Path, launch: Launch, function) -> None:
    try:
        said = repr(rendezvous.broadcast_from_rank_zero(function, launch))
    except (InputError, PeerLostError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / str(launch.rank)).write_text(said)


def _hurry() -> None:
    rendezvous.HEARTBEAT, rendezvous.SILENCE_SECONDS = rendezvous.HEARTBEAT / 50, 1.0


def found(folder: Path, launch: Launch) -> None:
    _attempt(folder, launch, lambda: (f"by {launch.rank}", "kept"))


def complains(folder: Path, launch: Launch) -> None:
    def complain():
        raise InputError(f"rank {launch.rank} found it")

    _attempt(folder, launch, complain)
    time.sleep(0.5 if launch.is_rank_zero else 0)  # the store lives in rank 0


def takes_longer_than_the_silence(folder: Path, launch: Launch) -> None:
    _hurry()

    def think():
        time.sleep(3)
        return "found", None

    _attempt(folder, launch, think)


def rank_zero_stops(folder: Path, launch: Launch) -> None:
    _hurry()

    def stop():
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    _attempt(folder, launch, stop)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def rank_zero_dies(folder: Path, launch: Launch) -> None:
    _attempt(folder, launch, lambda: os._exit(1))


def answers(folder: Path, case, world: int = 3) -> list[str]:
    run_in_world(case, world, folder)
    files = [folder / str(rank) for rank in range(world)]
    return [file.read_text() if file.exists() else "" for file in files]


def test_all_ranks_get_what_rank_zero_found_and_it_alone_what_it_keeps(tmp_path):
    assert answers(tmp_path, found) == ["('by 0', 'kept')", *["('by 0', None)"] * 2]


def test_a_world_of_one_needs_no_store():
    launch = Launch(0, 0, 1)
    assert rendezvous.broadcast_from_rank_zero(lambda: (1, 2), launch) == (1, 2)


def test_rank_zeros_complaint_is_everyones(tmp_path):
    assert answers(tmp_path, complains) == ["InputError: rank 0 found it"] * 3


def test_rank_zero_may_take_its_time(tmp_path):
    assert answers(tmp_path, takes_longer_than_the_silence, 2) == ["('found', None)"] * 2


@pytest.mark.parametrize("case", [rank_zero_stops, rank_zero_dies])
def test_the_others_end_where_rank_zero_is_gone(tmp_path, case):
    first, second = answers(tmp_path, case, 2)
    assert first == "" and second.startswith("PeerLostError: rank 0 ")
