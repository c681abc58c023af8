"""The demo's figures, as launch/demo_report.py leaves them and benchmarks/demo.py keeps them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A finished demo of 4 steps, logged every other."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    lines = [
        {"step": step, "samples_seen": 64 * step, "loss": 4.0, "step_seconds": 0.5}
        for step in (1, 2, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recalls = {f"{d}_recall@{k}": 0.1 for d in DIRECTIONS for k in (1, 5, 10)}
    (tmp_path / "retrieval.json").write_text(json.dumps(recalls))
    (tmp_path / "zero_shot.json").write_text('{"top1": 0.2, "top5": 0.8, "classes": 8}')
    return tmp_path


DIRECTIONS = ("image_to_text", "text_to_image")


def test_the_report_counts_the_time_of_all_steps(run):
    figures = importlib.import_module("demo_report").read_figures(run, 1e-7, chance=0.01)
    assert figures["training_seconds"] == pytest.approx(2.0)
    assert figures["pairs_per_second"] == pytest.approx(128)
    assert (figures["zero_shot_chance"], figures["largest_feature_difference"]) == (0.125, 1e-7)


def test_the_results_are_the_report_and_where_it_ran(run, monkeypatch):
    demo = importlib.import_module("demo")
    (run / "report.json").write_text('{"steps": 4}')
    results = demo.results_of(run, seconds=None)
    assert (results["steps"], results["seconds"]) == (4, None)
    assert results["environment"]["python"] == sys.version.split()[0]


def test_results_without_a_picture_are_one_file(tmp_path, monkeypatch, run):
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    (path,) = common.write_results("demo", {"environment": {"date": "2026-01-02"}})
    assert path.name == "2026-01-02-demo.json"
    assert json.loads(path.read_text())["environment"]["date"] == "2026-01-02"


def test_the_picture_of_a_demo_lies_beside_its_results(tmp_path, monkeypatch, run, capsys):
    demo, common = importlib.import_module("demo"), importlib.import_module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    (run / "report.json").write_text('{"steps": 4}')
    (run / "mixes.png").write_bytes(b"a picture")
    monkeypatch.setattr(sys, "argv", ["demo.py", "finetune_demo", "--run", str(run)])
    demo.main()
    picture, results = sorted((tmp_path / "results").iterdir(), key=lambda path: path.suffix)[::-1]
    assert picture.name.endswith("-finetune-demo.png") and picture.read_bytes() == b"a picture"
    assert results.name == picture.with_suffix(".json").name
    assert json.loads(results.read_text())["steps"] == 4
