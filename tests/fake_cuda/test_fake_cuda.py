"""What a training step does on a GPU beside its arithmetic, counted without one.

Stubs of CUDA (build.py) let torch believe in an H100, and the real step runs on fake tensors
(steps.py); a mix of devices raises there by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from parallel_clip.plan.rank_process import CONTEXT_BYTES
from tests.fake_cuda import build
from tests.fake_cuda.cases import CASES, LAYER_CASES
from tests.fake_cuda.expected import FEED, KERNELS, STEP, STEP_WITH_DUPLICATES, Counted
from tests.plan.small_plans import small_plan

ROOT = Path(__file__).parents[2]
PROCESSES = (
    2  # that share the cases: importing torch and megatron-core takes one longer than a case
)


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake device."""
    reason = build.why_not()
    if reason is not None:
        if os.environ.get("PARALLEL_CLIP_REQUIRE_FAKE_CUDA"):
            pytest.fail(f"PARALLEL_CLIP_REQUIRE_FAKE_CUDA is set, and the fake device {reason}")
        pytest.skip(f"the fake device {reason}")
    folder = tmp_path_factory.mktemp("stubs")
    build.build(folder)
    return folder


@pytest.fixture(scope="session")
def found(stubs: Path) -> dict[str, Any]:
    """What steps.py prints of each case."""
    names = list(CASES)
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = [names[first::PROCESSES] for first in range(PROCESSES)]
        printed = pool.map(lambda share: _run(stubs, "steps", *share), shares)
        return {answer["case"]: answer for answers in printed for answer in answers}


def _run(stubs: Path, module: str, *arguments: object) -> list[dict[str, Any]]:
    """What a module of this folder prints with the fake device."""
    command = [sys.executable, "-m", f"tests.fake_cuda.{module}", *map(str, arguments)]
    surroundings = build.environment(stubs) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_watch_sees_what_it_is_to_count(found):
    assert found["probes"]["unexpected"] == []


@pytest.mark.parametrize("part", ["step", "feed"])
@pytest.mark.parametrize("case", CASES)
def test_reads_copies_and_waits(found, case, part):
    counted = found[case][part]
    counts = Counted(*(sum(counted[what].values()) for what in Counted._fields))
    step = STEP_WITH_DUPLICATES if "duplicates" in case else STEP
    expected = step if part == "step" else FEED.get(case, Counted())
    assert counts == expected, "\n".join(_listed(counted))


def _listed(counted: dict[str, dict[str, int]]) -> Iterator[str]:
    for what in Counted._fields:
        yield f"{what}:"
        yield from (f"  {count} x {caller}" for caller, count in sorted(counted[what].items()))


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_of_contiguous_tensors_on_the_device(found, case):
    for part in ("step", "feed"):
        assert not found[case][part]["refused"]
    if CASES[case].world > 1:
        assert found[case]["step"]["collectives"]


def test_kernels_of_a_layer(found):
    """Of the picture tower, for one microbatch."""
    version = ".".join(found["bf16"]["megatron"].split(".")[:2])
    if version not in KERNELS:
        pytest.skip(f"no numbers for megatron-core {version}")
    parts = "forward", "backward", "optimizer"
    counted = {
        case: tuple(found[case]["layer"].get(part, 0) for part in parts) for case in LAYER_CASES
    }
    table = [f"{case:24}" + "".join(f"{n:10}" for n in counted[case]) for case in LAYER_CASES]
    print("\n".join([" " * 24 + "".join(f"{part:>10}" for part in parts), *table]))
    assert counted == KERNELS[version]


def test_a_plan_asks_the_gpu_for_its_memory_and_a_dry_run_touches_none(stubs, tmp_path):
    (said,) = _run(stubs, "planning", tmp_path)
    assert not said["dry_run_touched_it"]
    assert "two-pass" in said["report"] and "on GPUs a run keeps as many graphs" in said["report"]
    assert said["stash"] == 4, "all fit"
    assert (
        "parallel.stash auto fills 75.4 GB at most, of 83.8 GB free of 85.9 GB on the GPU of rank 0"
        in said["notes"]
    )
    predicted = said["predicted"]
    assert "H100" in predicted["device"] and predicted["step_seconds"] > 0
    kinds = predicted["memory_bytes"]
    assert kinds["process"] == CONTEXT_BYTES and kinds["total"] < predicted["limit_bytes"]
    assert predicted["metrics_memory_bytes"] == kinds["total"] - CONTEXT_BYTES - kinds["slack"]
    assert said["saved"] == small_plan(tmp_path, 4, dry_run=True).memory[0].saved
