"""compare.py says where two runs differ, and its exit code that they do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.golden.compare import RunOutput, checked_out, compare, parse_arguments, report
from tests.golden.runs import LAYOUTS, GoldenLayout, GoldenRun

BASE = RunOutput(
    metrics=[{"step": 1, "loss": 4.25, "logit_bias": None, "source_samples": [8, 8]}],
    tensors={"weight:a": torch.tensor([3.0, 4.0]), "weight:scale": torch.tensor(2.0)},
)


def with_loss(loss: float) -> RunOutput:
    return replace(BASE, metrics=[{**BASE.metrics[0], "loss": loss}])


def with_weight(*values: float) -> RunOutput:
    return replace(BASE, tensors={**BASE.tensors, "weight:a": torch.tensor(values)})


@pytest.mark.parametrize("tolerance", [0, 1e-5])
def test_equal_runs_agree(tolerance):
    same = RunOutput(list(BASE.metrics), {k: v.clone() for k, v in BASE.tensors.items()})
    assert compare(BASE, same, tolerance) == []


def test_one_bit_is_a_difference_between_commits_and_not_between_layouts():
    new_loss, new_weight = with_loss(4.25 * (1 + 1e-9)), with_weight(3.0, 4.0 + 5e-7)
    assert [found.where for found in compare(BASE, new_loss, 0)] == ["step 1 loss"]
    assert [found.where for found in compare(BASE, new_weight, 0)] == ["weight:a"]
    assert compare(BASE, new_loss, 1e-5) == compare(BASE, new_weight, 1e-5) == []


def test_the_sign_of_zero_is_a_bit():
    assert len(compare(with_weight(0.0, 1.0), with_weight(-0.0, 1.0), 0)) == 1


def test_a_difference_above_the_tolerance_is_told_with_its_size():
    (loss,) = compare(BASE, with_loss(4.25 * 1.01), 1e-5)
    (weight,) = compare(BASE, with_weight(3.0, 4.05), 1e-5)
    assert (loss.where, weight.where) == ("step 1 loss", "weight:a")
    assert (loss.relative, weight.relative) == pytest.approx((0.01, 0.01), rel=1e-3)


@pytest.mark.parametrize("tolerance", [0, 1e-5])
def test_what_lacks_is_a_difference(tolerance):
    two_steps = replace(BASE, metrics=[*BASE.metrics, {"step": 2, "loss": 4.0}])
    one_tensor = replace(BASE, tensors={"weight:a": BASE.tensors["weight:a"]})
    other_shape = with_weight(3.0, 4.0, 5.0)
    found = [compare(BASE, new, tolerance) for new in (two_steps, one_tensor, other_shape)]
    assert [[d.where for d in differences] for differences in found] == [
        ["step 2 step", "step 2 loss"],
        ["weight:scale"],
        ["weight:a"],
    ]


def test_a_tensor_that_is_nearly_zero_is_measured_by_the_others_of_its_kind():
    near_zero = [{"weight:b": torch.tensor([b])} for b in (0.0, 1e-6)]
    runs = [replace(BASE, tensors={**BASE.tensors, **tensors}) for tensors in near_zero]
    assert [found.where for found in compare(*runs, 0)] == ["weight:b"]
    assert compare(*runs, 1e-5) == []
    alone = [replace(BASE, tensors={"exp_avg:b": torch.tensor([b])}) for b in (0.0, 1e-6)]
    assert [found.where for found in compare(*alone, 1e-5)] == ["exp_avg:b"]


def test_not_a_number_differs_from_a_number_and_not_from_itself():
    nan = float("nan")
    assert len(compare(BASE, with_loss(nan), 1e-5)) == 1
    assert len(compare(BASE, with_weight(3.0, nan), 1e-5)) == 1
    assert compare(with_loss(nan), with_loss(nan), 0) == []


def test_the_exit_code_says_whether_all_agree(capsys):
    assert report({"fp32-1111": []}, 0) == 0
    assert report({"fp32-1111": [], "fp32-1211": compare(BASE, with_loss(4.0), 0)}, 0) == 1
    assert "1 of 2 agree bit for bit" in capsys.readouterr().out


def test_a_run_folder_is_read_without_its_times(tmp_path):
    line = {"step": 1, "loss": 4.25, "step_seconds": 0.5, "memory_bytes": 9}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    folder = tmp_path / "checkpoints/step_00000001"
    folder.mkdir(parents=True)
    pieces = [{"start": start, "file": f"{start}.safetensors", "stored": "a"} for start in (0, 1)]
    for piece in pieces:  # as two tensor ranks write it
        save_file({"a": torch.tensor([3.0 + piece["start"]])}, folder / piece["file"])
    index = {"weight:a": {"shape": [2], "axis": 0, "pieces": pieces}}
    (folder / "index.json").write_text(json.dumps(index))
    (folder.parent / "latest").write_text("step_00000001\n")
    run = RunOutput.read(tmp_path)
    assert run.metrics == [{"step": 1, "loss": 4.25}]
    assert run.tensors["weight:a"].tolist() == [3.0, 4.0]


def test_layouts_are_named_by_four_digits():
    layout = GoldenLayout.parse("2121")
    assert (layout.world, str(layout), layout in LAYOUTS) == (4, "2121", True)
    assert "parallel.sequence=true" in GoldenRun("fp32", LAYOUTS[1]).overrides(Path("run"))
    for wrong in ("121", "1201", "abcd"):
        with pytest.raises(ValueError, match="four digits"):
            GoldenLayout.parse(wrong)


def test_two_commits_or_two_layouts_are_asked_for():
    commits = parse_arguments(["v1", "v2"])
    assert (commits.steps, commits.precision) == (20, ["fp32", "bf16"])
    layouts = parse_arguments(["v1", "--layouts", "1111", "1211"])
    assert (layouts.steps, layouts.precision, layouts.new) == (4, ["fp32"], None)
    with pytest.raises(SystemExit):
        parse_arguments(["v1", "--layouts", "1111"])


def test_a_commit_that_git_does_not_know_ends_it():
    with pytest.raises(SystemExit, match="cannot check"), checked_out("no-such-commit"):
        raise AssertionError("not reached")
