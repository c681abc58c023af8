"""The benchmark runs, and its bars are those of the real model code."""

import subprocess
import sys
from pathlib import Path

import pytest

from parallel_clip.layout import Layout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.memory import dry_run
from tests.small_models import small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.long  # a minute; its parts are tested above
def test_the_quick_run_prints_tables():
    command = [sys.executable, BENCHMARKS / "memory_scaling.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "real processes" in done.stdout
    assert "ViT-B-32" in done.stdout and "vision.post_norm" in done.stdout
    assert "at pipeline 2 the stages have 6, 6 vision layers and 6, 6 text layers" in done.stdout


@pytest.fixture
def memory_scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("memory_scaling")


@pytest.mark.long
def test_memory_of_the_bars_model_shrinks_with_the_tensor_size(memory_scaling):
    architecture = load_architecture(memory_scaling.BAR_MODEL)

    def held(tensor: int):
        layout = Layout(tensor, tensor=tensor, sequence=tensor > 1)
        config = memory_scaling.config_for(layout, "none", pairs=2)
        return dry_run(config, architecture, make_layout_plan(architecture.costs, tensor, config))

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


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_is_counted_once_is_what_each_stage_holds(memory_scaling, recompute):
    # The text tower's 2 layers begin late and end early; stages in the middle are alike.
    model_cfg = small_model({"layers": 8}, {"layers": 2})
    architecture = architecture_from_json(model_cfg, "small")
    layout = Layout(10, tensor=2, pipeline=5, sequence=True)
    counts = memory_scaling.Counts(architecture, pairs=3)
    counts.held(layout, "none")  # of state, what is counted for another recompute serves
    config = memory_scaling.config_for(layout, recompute, pairs=3)
    for stage in range(layout.pipeline):
        plan = make_layout_plan(architecture.costs, layout.world, config)
        alone = dry_run(config, architecture, plan, rank=2 * stage)
        assert counts.held(layout, recompute, stage) == alone


def test_the_first_of_p_stages_holds_p_microbatches_and_its_layers_once(memory_scaling):
    architecture = architecture_from_json(small_model({"layers": 4}, {"layers": 4}), "small")
    counts = memory_scaling.Counts(architecture, pairs=3)
    alone, halves, quarters = memory_scaling.measure_pipelines(counts, [1], [1, 2, 4], ["none"])
    assert alone.activations == alone.unsplit.saved, "the unsplit model holds one microbatch"
    for row in (halves, quarters):
        assert row.fullest == 0
        assert row.activations == row.pipeline * row.held.saved
        layers = alone.held.state - alone.outside_layers
        in_layers = row.held.state - row.outside_layers
        assert in_layers == pytest.approx(layers / row.pipeline, rel=0.01), "padded buffers"
