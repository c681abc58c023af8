"""`plan.check`: what is refused, what is said of it, and that what is offered fits."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from parallel_clip.config import Config, load_config
from parallel_clip.engine.host_memory import HostMemory
from parallel_clip.errors import InputError
from parallel_clip.plan import memory_limit, memory_of_run
from parallel_clip.plan.memory_limit import Machine, find_memory_limit, ranks_on_machine
from parallel_clip.plan.phase_models import phase_models
from parallel_clip.plan.prediction import comparison_words
from parallel_clip.plan.rank_process import CPU_BYTES, WORKER_BYTES
from parallel_clip.plan.report import dry_run_report
from parallel_clip.plan.resume import ResumePoint
from parallel_clip.plan.run_plan import RunPlan, make_run_plan
from parallel_clip.plan.segment_plan import plan_segments
from parallel_clip.plan.segments import find_segments
from parallel_clip.plan.start_model import find_start_model
from tests.plan.small_plans import small_config, small_plan

LEAST = (
    "parallel.tensor=2", "parallel.sequence=true", "parallel.schedule=two-pass", "batch.micro=1",
    "recompute=full",
)  # fmt: skip
PHASES = [{"until": "50%", "resolution": 16}, {"resolution": 32, "patch_dropout": 0.0}]


def written(folder: Path, **settings) -> Path:
    """A config file of 96 pairs, 24 in a microbatch, which all keep their graphs."""
    tree = small_config(folder, 1).to_tree()
    tree["batch"] = {"global": 96, "micro": 24}
    tree["parallel"]["schedule"] = "stash"
    tree["train"] = {"steps": 10}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | settings))
    return path


def planned(path: Path, world: int, *overrides: str) -> RunPlan:
    return make_run_plan(load_config(path, overrides), world)[0]


def needed(path: Path, world: int, *overrides: str) -> int:
    """Bytes of the part of the run that needs most."""
    plan = planned(path, world, *overrides)
    return max(each.prediction.memory.total for each in plan.segments)


def offers(words: str) -> list[list[str]]:
    """The overrides of each layout that a message offers."""
    return [shlex.split(line) for line in words.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {}),
        (2, {"parallel": {"distributed_optimizer": False, "schedule": "stash"}}),
        (4, {"phases": PHASES}),
    ],
)
def test_just_enough_runs_and_a_byte_less_is_refused_with_layouts_that_fit(
    tmp_path, world, settings
):
    path = written(tmp_path, **settings)
    enough = needed(path, world)
    assert planned(path, world, f"parallel.memory={enough}").layout_plan.stash == 96 // world // 24
    told = f"parallel.memory={enough - 1}"
    with pytest.raises(InputError) as refusal:
        planned(path, world, told)
    words = str(refusal.value)
    assert f"needs more memory than there is: {enough / 1e9:.2f} GB (" in words
    assert f"a rank has {enough / 1e9:.2f} GB, parallel.memory {enough - 1}" in words
    assert ("phases.1: stage" in words) == ("phases" in settings)
    found = offers(words)
    assert len(found) == 3 and len(set(map(tuple, found))) == 3
    for overrides in found:
        plan = planned(path, world, told, *overrides)
        assert plan.batch.global_batch == 96
        assert all(each.prediction.memory.total < enough for each in plan.segments)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "model.json", "shards"}


def test_what_is_offered_names_only_what_differs(tmp_path):
    path = written(tmp_path)
    large = "parallel.schedule=two-pass", "batch.micro=96"
    with pytest.raises(InputError) as refusal:
        planned(path, 1, f"parallel.memory={needed(path, 1, *large) - 1}", *large)
    keys = [
        {word.partition("=")[0] for word in overrides} for overrides in offers(str(refusal.value))
    ]
    assert all(each <= {"batch.micro", "recompute", "parallel.schedule"} for each in keys)
    # The same keys in a file: one config, whichever way it is written.
    assert {"batch.micro", "parallel.schedule"} in keys


def test_nothing_fits_is_told_with_the_least(tmp_path):
    with pytest.raises(InputError) as refusal:
        planned(written(tmp_path), 2, "parallel.memory=500MB")
    words = str(refusal.value)
    assert offers(words) == []
    assert "No layout of 2 processes fits: the least is " in words
    assert f"{needed(written(tmp_path), 2, *LEAST) / 1e9:.2f} GB, for tensor 2 x pipeline" in words
    assert "lower batch.global" in words


def test_warn_says_the_same_and_goes_on(tmp_path):
    path = written(tmp_path)
    told = f"parallel.memory={needed(path, 1) - 1}"
    with pytest.raises(InputError) as refusal:
        planned(path, 1, told)
    plan = planned(path, 1, told, "plan.check=warn")
    assert (
        list(plan.notes[-len(str(refusal.value).splitlines()) :]) == str(refusal.value).splitlines()
    )


@pytest.mark.parametrize("off", ["off", '"off"'])
def test_off_counts_nothing(tmp_path, monkeypatch, off):
    def count(*_, **__):
        raise AssertionError("counted")

    monkeypatch.setattr(memory_of_run, "predict_step_memory", count)
    plan = planned(written(tmp_path), 1, f"plan.check={off}")
    assert plan.prediction is None and plan.memory is None


def test_off_fills_what_is_told_all_the_same(tmp_path):
    enough = small_plan(tmp_path, 6, schedule="stash").prediction.memory.total
    config = small_config(tmp_path, 6, memory=enough)
    off = config.model_copy(update={"plan": config.plan.model_copy(update={"check": "off"})})
    for memory, stash in ((enough, 6), (1000, 0)):
        parallel = off.parallel.model_copy(update={"memory": memory})
        plan, _ = make_run_plan(off.model_copy(update={"parallel": parallel}), 1)
        assert plan.layout_plan.stash == stash


def test_phases_that_are_done_need_no_memory(tmp_path):
    small, large = {"resolution": 16}, {"resolution": 32}
    order = written(tmp_path, phases=[large | {"until": "50%"}, small])
    told = f"parallel.memory={needed(order, 1) - 1}"
    with pytest.raises(InputError, match=r"^phases\.0: stage 0 needs"):
        planned(order, 1, told)
    config = load_config(order, [told])
    models = phase_models(config, find_start_model(config, ResumePoint()).architecture)
    of_run = config, models, find_segments(config, 10), [], 1, Machine(1), False
    assert len(plan_segments(*of_run, done=5)[0]) == 2
    with pytest.raises(InputError):
        plan_segments(*of_run, done=4)


# ------------------------------------------------------------------------------ whose memory it is


def small_machine(monkeypatch, free: int) -> None:
    found = HostMemory(2 * free, free, "a small machine")
    monkeypatch.setattr(memory_limit, "host_memory", lambda *_: found)


def test_ranks_of_a_machine_share_its_memory(tmp_path, monkeypatch):
    small_machine(monkeypatch, 8 * 10**9)
    config = small_config(tmp_path, 1)
    limit = find_memory_limit(config, Machine(4))
    assert (limit.size, limit.to_fill) == (2 * 10**9, None)
    words = "a share of one of 4 in 8.00 GB that are free of 16.00 GB of a small machine"
    assert limit.words == words
    assert ranks_on_machine(3) == 3 and ranks_on_machine(64) == 8 and ranks_on_machine(64, 4) == 4


def test_a_dry_run_refuses_for_this_machine_and_tells_for_others(tmp_path, monkeypatch):
    small_machine(monkeypatch, CPU_BYTES)
    path = written(tmp_path)
    config = load_config(path, [])
    with pytest.raises(InputError, match="of a small machine"):
        dry_run_report(config)
    report = dry_run_report(config, 1)  # --world-size: processes that may be started elsewhere
    assert "it would be refused here; parallel.memory=80GB compares" in report
    report = dry_run_report(load_config(path, ["parallel.memory=1.5GB"]), 1)
    assert "a rank has 1.50 GB, parallel.memory 1.5GB" in report
    with pytest.raises(InputError, match="parallel.memory 0.9GB"):
        dry_run_report(load_config(path, ["parallel.memory=0.9GB"]), 1)


def test_workers_count_where_they_read(tmp_path):
    def of(workers: int, **settings) -> RunPlan:
        config = small_config(tmp_path, 2, schedule="two-pass", **settings)
        data = config.data.model_copy(update={"workers": workers})
        world = config.parallel.tensor * config.parallel.pipeline
        return make_run_plan(config.model_copy(update={"data": data}), world)[0]

    none, three = (of(n).prediction for n in (0, 3))
    ready = 3 * 2 * 2 * 3 * 32 * 32  # workers, each two microbatches of two pictures of bytes
    assert three.memory == replace(none.memory, workers=3 * WORKER_BYTES + ready)
    assert three.metrics_bytes == none.metrics_bytes, "the rank's own process"
    assert of(3, memory="2GB").prediction.memory == none.memory, "what is told is the rank's own"


# ------------------------------------------------------------------------------------------ time


def with_device(folder: Path, device: str | None) -> Config:
    config = small_config(folder, 4)
    return config.model_copy(update={"plan": config.plan.model_copy(update={"device": device})})


def test_time_is_predicted_where_a_device_is_told(tmp_path):
    plan, _ = make_run_plan(with_device(tmp_path, "h100"), 1)
    assert plan.prediction.seconds > 0 and "H100" in plan.prediction.device
    assert "predicted step: " in dry_run_report(with_device(tmp_path, "h100"))
    assert make_run_plan(with_device(tmp_path, None), 1)[0].prediction.seconds is None
    with pytest.raises(InputError, match="no file of this name"):
        make_run_plan(with_device(tmp_path, "h1000"), 1)


def test_what_came_true_is_said_in_words(tmp_path):
    prediction = small_plan(tmp_path, 1).prediction
    measured = prediction.metrics_bytes // 2
    words = comparison_words(prediction, measured, 0.5)
    assert words.endswith(" predicted (+100%)") and "step" not in words
    timed = replace(prediction, seconds=0.25, device="a GPU")
    assert comparison_words(timed, measured, 0.5).endswith(
        "; step 0.5 s measured, 0.25 s predicted (-50%)"
    )


def test_on_a_gpu_metrics_see_what_torch_allocates(tmp_path):
    prediction = small_plan(tmp_path, 1).prediction
    memory = prediction.memory
    on_gpu = replace(prediction, on_gpu=True)
    assert on_gpu.metrics_bytes == memory.total - memory.process - memory.slack
