"""Settings of the tests on one CUDA device. `pytest tests/gpu --rehearse` runs them on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parallel_clip.engine.groups import Groups, close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="run tests/gpu on the CPU: shows that they run, and nothing about a GPU",
    )


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest) -> Iterator[Groups]:
    """A world of this process: the GPU, or with `--rehearse` the CPU. One for all tests, as NCCL
    takes seconds to start."""
    join_world(Launch(0, 0, 1))
    made = make_groups(Layout(1))
    rehearsed = request.config.getoption("--rehearse", default=False)
    assert made.device.type == "cuda" or rehearsed
    # In the report: what the figures of a failure belong to.
    if made.device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    yield made
    close_groups()


@pytest.fixture
def command() -> Callable[..., None]:
    """Runs `parallel-clip ARGUMENTS` in a process of its own on the device of these tests; it must
    end well."""

    def run(*arguments: object) -> None:
        # By hand and not by tests/launcher.py, which hides the GPUs.
        words = [sys.executable, "-m", "parallel_clip", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"

    return run
