"""The pipeline benchmark records what its ranks are supposed to do. Times are not judged."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_clip.pipeline.orders import OpKind, step_orders
from parallel_clip.pipeline.timeline import Costs, Span

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def pipeline():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("pipeline_cases")


@pytest.fixture(scope="module")
def measured(pipeline):
    """Cases and a step of each: those of the quick run, towers in turns, a real model."""
    cases = [plan.case for plan in pipeline.quick_plans()]
    cases.append(pipeline.Case(2, 3, 1, towers=2 * cases[0].towers))
    cases.append(pipeline.Case(2, 2, 1))
    measure = importlib.import_module("simulated_stages").measure
    return [(case, step) for case, (step,) in zip(cases, measure(cases, 1), strict=True)]


@pytest.mark.long  # its parts are tested above and below
def test_the_quick_run_prints_tables():
    command = [sys.executable, BENCHMARKS / "pipeline.py", "--quick", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "interleaved" in done.stdout and "ideal" in done.stdout


def test_ranks_run_the_ops_of_the_schedule_in_its_order(pipeline, measured):
    for case, step in measured:
        for rank, order in enumerate(pipeline.orders_of(case)):
            spans = [span for span in step.spans if span.rank == rank]
            assert [span.op for span in spans] == order, (case, rank)
            for span, following in zip(spans, spans[1:], strict=False):
                assert 0 <= span.start <= span.end <= following.start
            assert spans[-1].end <= step.total


def test_stages_sleep_at_least_as_long_as_they_are_told(pipeline, measured):
    case, step = measured[0]
    row = pipeline.row_of(pipeline.quick_plans()[0], [step])
    asked = case.towers[0]
    for span in step.spans:
        if span.op.kind in (OpKind.FORWARD_WITHOUT_GRAPH, OpKind.FORWARD_AGAIN, OpKind.BACKWARD):
            told = asked.backward if span.op.kind is OpKind.BACKWARD else asked.forward
            assert span.end - span.start >= told[0]
    # a forward and a backward of each microbatch, and two of three forwards a second time
    assert row.compute >= (3 * (1 + 2) + 2) / (3 * (1 + 2))
    assert row.overslept >= 0
    assert row.ideal <= row.step.total


@pytest.mark.parametrize("name, ranks, microbatches", [("ViT-L-14", 3, 8), ("ViT-B-16", 8, 16)])
def test_both_ways_of_dealing_towers_hold_the_whole_model(pipeline, name, ranks, microbatches):
    (fused,), (vision, text) = pipeline.tower_costs(name, ranks, microbatches)
    assert len(fused.forward) == len(vision.forward) == len(text.forward) == ranks
    assert sum(fused.forward) == pytest.approx(sum(vision.forward) + sum(text.forward))
    assert max(fused.forward) == pytest.approx(pipeline.FORWARD)
    assert max(vision.forward) + max(text.forward) >= max(fused.forward) * 0.98


def test_ideals_of_equal_and_uneven_stages(pipeline):
    """Two microbatches on two ranks: F0 F1 | loss | F0 B0 F1 B1, and B1 on the first rank."""

    def ideal(*forward: float) -> float:
        costs = Costs(list(forward), [2 * seconds for seconds in forward])
        case = pipeline.Case(2, 2, towers=(costs,))
        spans = [
            Span(rank, op, 0, 0 if op.kind is OpKind.LOSS else costs.seconds(op, rank))
            for rank, order in enumerate(step_orders(2, 2))
            for op in order
        ]
        return pipeline.ideal_seconds(case, pipeline.Step(spans, 0))

    def formula(*forward: float) -> float:
        costs = Costs(list(forward), [2 * seconds for seconds in forward])
        return pipeline.formula_seconds(pipeline.Case(2, 2, towers=(costs,)))

    assert ideal(1, 1) == formula(1, 1) == pytest.approx(1 + 2 + 2 * (1 + 2) + 2)
    assert ideal(1, 2) == formula(1, 2)
    assert ideal(1, 2) == pytest.approx(1 + 2 * 2 + 2 * (2 + 4) + 2)
