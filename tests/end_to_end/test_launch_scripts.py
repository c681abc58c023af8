"""Real launchers: torchrun on one machine, and on two that are one, through a rendezvous."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_world import ledger, make_world, metrics

REPOSITORY = Path(__file__).parents[2]

# A rank 0 that is behind the others, as on a machine with much to do.
SLOW_RANK_0 = """
import os, sys, time
time.sleep(3 if os.environ["RANK"] == "0" else 0)
from parallel_clip.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*command: object, **environment: object) -> subprocess.Popen:
    variables = {
        "PYTHON": sys.executable,
        "PYTHONPATH": REPOSITORY,
        "OMP_NUM_THREADS": 1,
        "CUDA_VISIBLE_DEVICES": "",
    } | environment
    return subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output(process: subprocess.Popen) -> str:
    try:
        return process.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail(f"no end: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_two_machines_meet(config):
    """What bash launch/torchrun.sh does on each of two machines, both of them this one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = f"localhost:{probe.getsockname()[1]}"
    script = ["bash", REPOSITORY / "launch/torchrun.sh", config, "train.steps=2"]
    machines = [start(*script, NODES=2, PROCESSES=1, RENDEZVOUS=meeting) for _ in range(2)]
    said = [output(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sum("on 2 processes: data 2" in text for text in said) == 1  # rank 0's
    assert [line["step"] for line in metrics(config.parent / "run")] == [1, 2]
    assert [position for _, position, _, _ in ledger(config.parent / "run")] == list(range(16))


def test_a_wrong_input_is_told_though_rank_0_is_late(config, tmp_path):
    """torchrun ends all once one has ended: no rank may leave before rank 0 has spoken."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RANK_0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    process = start(*torchrun, script, "train", config, "batch.global=9", f"run_dir={tmp_path}/run")
    said = output(process)
    assert process.returncode == 1  # torchrun's own
    assert said.count("parallel-clip: batch.global 9 is not divisible") == 1, said
