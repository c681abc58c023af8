"""The real torchrun: signals to it, its death, a port that is taken, its restarts; and mpirun's
environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher import succeed
from tests.small_world import make_world, metrics, status

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def torchrun(*words: object, options: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", "2"]
    command += ["-m", "parallel_clip", *(str(word) for word in words)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run_dir: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {seconds} s")


def long_run(config: Path, run_dir: Path) -> tuple:
    return ("train", config, f"run_dir={run_dir}", "train.steps=100000", "checkpoint.keep=2")


def test_a_signal_to_torchrun_saves_once(config, tmp_path):
    run_dir = tmp_path / "run"
    process = torchrun(*long_run(config, run_dir))
    wait_for_step(run_dir, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert status(run_dir)["state"] == "stopped"
    assert status(run_dir)["reason"] == "signal:SIGTERM"
    latest = (run_dir / "checkpoints/latest").read_text().strip()
    assert latest == f"step_{status(run_dir)['step']:08d}"
    assert "rank 0 failed" not in err


@pytest.mark.long
def test_ranks_whose_launcher_has_gone_save_and_end(config, tmp_path):
    run_dir = tmp_path / "run"
    process = torchrun(*long_run(config, run_dir))
    wait_for_step(run_dir, 3)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for left in alive:
        left.kill()
    assert alive == []
    assert status(run_dir)["state"] in ("stopped", "failed")


def test_a_restart_by_torchrun_goes_on(config, tmp_path):
    run_dir = tmp_path / "run"
    words = ("train", config, f"run_dir={run_dir}", "train.steps=12")
    process = torchrun(*words, options=("--standalone", "--max-restarts", "2"))
    wait_for_step(run_dir, 3)
    ranks = psutil.Process(process.pid).children()
    ranks[-1].kill()
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert status(run_dir)["state"] == "finished"
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 13))


def test_a_port_that_is_taken_is_named(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = ENVIRONMENT | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-m", "parallel_clip", "train", str(config)]
        ended = subprocess.run(
            [*command, f"run_dir={tmp_path / 'run'}"],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert ended.returncode == 2, ended
    assert f"port {port} is in use" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.long
def test_processes_of_mpirun_train_together(config, tmp_path):
    """Open MPI's environment, as it sets it for two processes on one host."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "parallel_clip", "train", str(config), f"run_dir={run_dir}"]
    processes = []
    for rank in range(2):
        environment = ENVIRONMENT | {
            "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "PMIX_NAMESPACE": f"prterun-{os.getpid()}@1",
        }  # fmt: skip
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(120) for process in processes] == [0, 0]
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    succeed("train", config, f"run_dir={run_dir}", processes=2)  # finished, by all
