"""Which rank a stalled job waits for, from what the ranks say; and a world of one that stalls."""

import threading
import time

import pytest
import torch.distributed as dist

from parallel_clip.training import watchdog as watchdog_module
from parallel_clip.training.watchdog import Progress, Report, Watchdog, diagnosis


def report(rank, moves=10, doing="forward", waiting=True, step=3) -> Report:
    return Report(rank, f"host{rank}", 100 + rank, step, doing, moves, 5.0, waiting, "a stack\n")


CASES = {
    "one does not answer": ([report(0), report(2)], 3, "rank 1 does not answer"),
    "two do not answer": ([report(0)], 3, "ranks 1, 2 do not answer"),
    "one sleeps": ([report(0), report(1, waiting=False), report(2)], 3, "rank 1 on host1"),
    "one is elsewhere": (
        [report(0), report(1), report(2, doing="evaluating")], 3, "rank 2 on host2",
    ),
    "one is behind": ([report(0, moves=12), report(1, step=2, moves=9)], 2, "rank 1 on host1"),
    "alone": ([report(0)], 1, "rank 0 on host0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_rank_that_the_others_wait_for_is_named_first(name):
    reports, world, named = CASES[name]
    message = diagnosis(reports, world)
    assert message.startswith(named)
    for one in reports:
        assert f"rank {one.rank} on host{one.rank} (process {100 + one.rank})" in message


def watch(tmp_path, progress, timeout):
    exits, stalls = [], []

    def exit_process(code):
        exits.append(code)
        time.sleep(1000)  # nothing comes after it

    watchdog = Watchdog(progress, timeout, 0, 1, None, tmp_path, stalls.append, exit_process)
    watchdog.start()
    return watchdog, exits, stalls


def test_a_stall_is_found_in_time_and_its_stack_is_written(tmp_path, capfd):
    progress = Progress()
    progress.mark("forward, backward and update", 5)
    began = time.monotonic()
    _, exits, stalls = watch(tmp_path, progress, 0.5)
    while not exits and time.monotonic() - began < 30:
        time.sleep(0.05)
    assert exits == [1] and "step 5, forward, backward and update" in stalls[0]
    assert "no progress for watchdog.timeout 0.5 s" in capfd.readouterr().err
    assert "test_a_stall_is_found_in_time" in (tmp_path / "stalled.txt").read_text()


def test_progress_is_no_stall(tmp_path):
    progress = Progress()
    watchdog, exits, _ = watch(tmp_path, progress, 4.0)
    for _ in range(50):
        time.sleep(0.1)
        progress.mark_again()
    watchdog.stop()
    threads = threading.active_count()
    time.sleep(1.5)
    assert exits == [] and threading.active_count() <= threads


def on_threads(tmp_path, progresses, timeout):
    """A watchdog for each rank, with a store that they share."""
    store, exits = dist.HashStore(), {}
    watchdogs = []
    for rank, progress in enumerate(progresses):

        def exit_process(code, rank=rank):
            exits[rank] = code
            time.sleep(1000)

        watchdogs.append(
            Watchdog(
                progress, timeout, rank, len(progresses), store, tmp_path, exit_process=exit_process
            )
        )
        watchdogs[-1].start()
    return watchdogs, exits


def test_ranks_that_wait_for_one_that_moves_have_not_stalled(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watchdog_module, "QUIET_SECONDS", 0.5)
    moving, waiting = Progress(), Progress()
    watchdogs, exits = on_threads(tmp_path, [waiting, moving], 4.0)
    for _ in range(60):
        time.sleep(0.1)
        moving.mark_again()
    assert exits == {} and capfd.readouterr().err == ""
    deadline = time.monotonic() + 30
    while len(exits) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert exits == {0: 1, 1: 1}
    assert capfd.readouterr().err.count("no progress for watchdog.timeout") == 1
    for watchdog in watchdogs:
        watchdog.stop()
