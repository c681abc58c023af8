"""`deterministic: true` twice gives the same bits: records of all steps, weights and moments."""

import pytest

from tests.golden.runs import CONFIG, GoldenLayout, GoldenRun, read_metrics
from tests.small_world import tensors

pytestmark = pytest.mark.gpu

STEPS = 3


@pytest.mark.parametrize("precision, recompute", [("fp32", "none"), ("bf16", "full")])
def test_two_runs_have_the_same_bits(command, tmp_path, precision, recompute):
    """In processes of their own: what it sets is read when cuBLAS starts, and stays set."""
    run = GoldenRun(precision, GoldenLayout(1, 1, 1, 1))
    for name in ("first", "second"):
        overrides = run.overrides(tmp_path / name, STEPS)
        command("train", CONFIG, *overrides, "deterministic=true", f"recompute={recompute}")
    first, second = tmp_path / "first", tmp_path / "second"
    records = read_metrics(first)
    assert len(records) == STEPS
    assert records == read_metrics(second)
    checkpoints = [next((run / "checkpoints").glob("step_*")) for run in (first, second)]
    assert tensors(checkpoints[0]) == tensors(checkpoints[1])
