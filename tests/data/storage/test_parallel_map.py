"""Several processes that work on shards: Ctrl-C, and one that the system kills."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from parallel_clip.data.storage.processes import parallel_map
from parallel_clip.errors import WorkerError
from tests.data.shard_files import write_shards

# The command, with samples that take a while; it says where its workers are.
SLOW = """
import os, sys, time
import parallel_clip.data.tools.check as check
from parallel_clip.cli import main
decode = check.decode_picture
def slowly(sample, rule):
    os.write(2, b"decoding\\n")  # by one call, as two processes do
    time.sleep(60)
    return decode(sample, rule)
check.decode_picture = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def checking(tmp_path):
    """`data check` with two workers that are both at a sample, in a group of processes."""
    write_shards(tmp_path, [2] * 5)
    command = [sys.executable, "-c", SLOW, "data", "check", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what runs in its background ignore Ctrl-C, the tests perhaps, too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(2):
        assert process.stderr.readline() == "decoding\n"
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen) -> list[int]:
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_all_processes_without_a_traceback(checking, to_all):
    workers = workers_of(checking)
    assert len(workers) == 2
    began = time.monotonic()
    (os.killpg if to_all else os.kill)(checking.pid, signal.SIGINT)
    out, err = checking.communicate(timeout=30)
    assert (checking.returncode, err) == (130, "parallel-clip: interrupted\n")
    assert "Traceback" not in out and time.monotonic() - began < 10
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_a_worker_that_is_killed_ends_the_command_with_one_sentence(checking):
    workers = workers_of(checking)
    os.kill(workers[0], signal.SIGKILL)
    _, err = checking.communicate(timeout=30)
    assert checking.returncode == 1
    assert err == (
        "parallel-clip: one of 2 worker processes was killed, after 0 shards. Where memory ran "
        "out, take fewer (--workers)\n"
    )
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def die_at_seven(number: int, more: int) -> int:
    if number == 7:
        time.sleep(0.3)  # what came before is handed on first
        os.kill(os.getpid(), signal.SIGKILL)
    return number * more


def test_results_come_in_order_until_a_process_dies():
    results = parallel_map(die_at_seven, range(7), range(7), workers=2)
    assert list(results) == [number**2 for number in range(7)]
    before = set(multiprocessing.active_children())
    results = parallel_map(die_at_seven, range(9), [1] * 9, workers=2)
    with pytest.raises(WorkerError, match="one of 2 worker processes was killed, after . shards"):
        list(results)
    assert set(multiprocessing.active_children()) <= before


def test_what_is_left_early_leaves_no_process():
    before = set(multiprocessing.active_children())
    results = parallel_map(time.sleep, [0.01, 60, 60, 60], workers=2)
    next(results)
    results.close()
    assert set(multiprocessing.active_children()) <= before
