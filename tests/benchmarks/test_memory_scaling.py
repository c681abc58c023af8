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

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    from memory_counts import Counts, config_for
    from memory_headline import MODEL, headline_rows
    from memory_pipelines import measure_pipelines
    from memory_tensor import BAR_MODEL, measure, missed_bars, tensor_sizes


@pytest.mark.long  # a minute and a half, where nothing else runs; its parts are tested below
@pytest.mark.timeout(1800)
def test_the_quick_run_prints_tables():
    command = [sys.executable, BENCHMARKS / "memory_scaling.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "real processes" in done.stdout
    assert "ViT-B-32" in done.stdout and "vision.post_norm" in done.stdout
    assert "at pipeline 2 the stages have 6, 6 vision layers and 6, 6 text layers" in done.stdout
    assert "OpenCLIP, FSDP2" in done.stdout


def test_memory_of_the_bars_model_shrinks_with_the_tensor_size():
    counts = Counts(load_architecture(BAR_MODEL), pairs=2)
    rows = list(measure(counts, [1, 2, 8], ["none"]))
    assert missed_bars(rows) == []
    assert len(missed_bars([row for row in rows if row.tensor == 1])) == 0


def test_sizes_that_do_not_divide_the_heads_are_explained():
    fitting, refusals = tensor_sizes(load_architecture("ViT-bigG-14"), [1, 2, 4, 8])
    assert fitting == [1, 2, 4]
    assert len(refusals) == 1 and "20 heads of the text tower" in refusals[0]


def test_counts_are_those_of_a_dry_run_of_the_stage():
    # The text tower's 2 layers begin late and end early.
    architecture = architecture_from_json(small_model({"layers": 8}, {"layers": 2}), "small")
    layout = Layout(10, tensor=2, pipeline=5, sequence=True)
    counts, config = Counts(architecture, pairs=3), config_for(layout, "selective", pairs=3)
    plan = make_layout_plan(architecture.costs, layout.world, config)
    for stage in (0, 3):
        held, alone = (
            counts.held(layout, "selective", stage),
            dry_run(config, architecture, plan, 2 * stage),
        )
        assert (held.state, held.saved) == (alone.state, alone.saved)


def test_the_first_of_p_stages_holds_p_microbatches_and_its_layers_once():
    architecture = architecture_from_json(small_model({"layers": 4}, {"layers": 4}), "small")
    counts = Counts(architecture, pairs=3)
    alone, halves, quarters = measure_pipelines(counts, [1], [1, 2, 4], ["none"])
    assert alone.activations == alone.unsplit.saved, "the unsplit model holds one microbatch"
    for row in (halves, quarters):
        assert row.fullest == 0
        assert row.activations == row.pipeline * row.held.saved
        layers = alone.held.state - alone.outside_layers
        in_layers = row.held.state - row.outside_layers
        assert in_layers == pytest.approx(layers / row.pipeline, rel=0.01), "padded buffers"


def test_no_set_of_bytes_is_the_published_one():
    rows = {row.what: row for row in headline_rows(load_architecture(MODEL))}
    weights = rows["fp32 weights"]
    assert weights.unsplit == 4 * 986_109_441, "OpenCLIP's ViT-H-14"
    assert (round(weights.ratio, 3), round(weights.ratio_with_whole_embedding, 3)) == (0.502, 0.528)
    gib = {what: round(row.unsplit / 2**30, 1) for what, row in rows.items()}
    found = [what for what, size in gib.items() if size == 4.7]
    assert found == ["fp32 weights and gradients of the vision tower"]
    assert round(rows[found[0]].ratio_with_whole_embedding, 2) == 0.50
