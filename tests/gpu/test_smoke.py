"""A GPU trains at all: a few steps from Python, and the command on the demo's config."""

import math

import pytest

from tests.golden.runs import CONFIG, GoldenLayout, GoldenRun, golden_metrics
from tests.gpu.step_runs import LR, MICROBATCHES, task_on
from tests.small_world import metrics, status
from tests.training.step_cases import train

pytestmark = pytest.mark.gpu

STEPS = 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_steps_lower_the_loss(groups, precision):
    task = task_on(groups, precision, recompute="none", schedule="auto")
    records, weights = train(groups, task, STEPS, LR, MICROBATCHES)
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(tensor.device.type == groups.device.type for tensor in weights.values())


def test_the_train_command_gives_the_golden_losses(command, tmp_path):
    """In fp32. The golden losses are of a CPU; 1e-4 is what another order of sums may change."""
    run = GoldenRun("fp32", GoldenLayout(1, 1, 1, 1))
    command("train", CONFIG, *run.overrides(tmp_path / "run", STEPS))
    lines = metrics(tmp_path / "run")
    assert status(tmp_path / "run")["state"] == "finished"
    golden = golden_metrics(run)[:STEPS]
    for line, wanted in zip(lines, golden, strict=True):
        for what in ("loss", "grad_norm"):
            assert line[what] == pytest.approx(wanted[what], rel=1e-4), (line["step"], what)


def test_the_train_command_runs_in_bf16(command, tmp_path):
    run = GoldenRun("bf16", GoldenLayout(1, 1, 1, 1))
    command("train", CONFIG, *run.overrides(tmp_path / "run", STEPS), "data.normalize=worker")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    # One step is not learned yet: random features of 64 pairs have a loss near log 64.
    assert losses[0] == pytest.approx(math.log(64), rel=0.2)
