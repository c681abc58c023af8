"""The commands of parallel_clip as a user runs them, and the files that a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]


def parallel_clip(*arguments: object, processes: int = 1, timeout: float = 280) -> str:
    """Runs a command on the CPU and returns what it printed; fails the test if the command fails.

    Several processes come from torchrun on a free port, one from plain python.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launcher = torchrun if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "parallel_clip", *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": REPOSITORY}
    process = subprocess.Popen(
        command,
        env=os.environ | {key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout} s: {command}\n{output[-4000:]}") from None
    assert process.returncode == 0, f"exit code {process.returncode}: {command}\n{output[-4000:]}"
    return output


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """What each sample of each step was: step (from 1), position, source, shard, key."""
    lines = [
        line for path in (run / "ledger").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]
