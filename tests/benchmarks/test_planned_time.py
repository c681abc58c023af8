"""The comparison of predicted with published throughput."""

from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from planned_time import CASES, draw, published_row
    from published_runs import RUNS

from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.layout_plan import make_layout_plan


def test_the_overhead_of_the_gpus_is_fitted_to_the_run_that_is_named():
    rows = [published_row(run) for run in RUNS]
    assert [abs(row.error) < 0.01 for row in rows] == [run.fitted for run in RUNS]
    # 559 pairs a second on eight GPUs
    assert rows[0].measured == pytest.approx(69.875)
    figure = draw(rows, rows)
    assert [len(axes.lines) for axes in figure.axes] == [1 + 5, 1 + 5], "equality, and each model"


@pytest.mark.parametrize("case", CASES)
def test_cases_can_be_run(case):
    plan = make_layout_plan(load_architecture(case.model).costs, case.ranks, case.config())
    assert (plan.batch.micro_batch, plan.batch.microbatches) == (case.micro, case.microbatches)
