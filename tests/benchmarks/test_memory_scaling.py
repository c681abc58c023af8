"""The benchmark runs, and its bars are those of the real model code."""

import subprocess
import sys
from pathlib import Path

import pytest

from parallel_clip.layout import Layout
from parallel_clip.model.architectures import load_architecture
from parallel_clip.plan.dry_run import dry_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_quick_run_prints_a_table():
    command = [sys.executable, BENCHMARKS / "memory_scaling.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "two real processes" in done.stdout
    assert "ViT-B-32" in done.stdout and "vision.patch_embedding" in done.stdout


@pytest.fixture
def memory_scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("memory_scaling")


def test_memory_of_the_bars_model_shrinks_with_the_tensor_size(memory_scaling):
    architecture = load_architecture(memory_scaling.BAR_MODEL)

    def held(tensor: int):
        layout = Layout(tensor, tensor=tensor, sequence=tensor > 1)
        return dry_run(memory_scaling.config_for(layout, "none", pairs=2), architecture, layout)

    unsplit = held(1)
    rows = [
        memory_scaling.Row(architecture.name, tensor, True, "none", held(tensor), unsplit)
        for tensor in (2, 8)
    ]
    assert memory_scaling.missed_bars(rows) == []


def test_sizes_that_do_not_divide_the_heads_are_explained(memory_scaling):
    fitting, refusals = memory_scaling.tensor_sizes(load_architecture("ViT-bigG-14"), [1, 2, 4, 8])
    assert fitting == [1, 2, 4]
    assert len(refusals) == 1 and "20 heads of the text tower" in refusals[0]
