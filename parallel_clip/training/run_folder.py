"""The files of a run folder, and how they are prepared. All of it happens on rank 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.commit import EVALUATIONS_FILE
from parallel_clip.checkpoint.manifest import utc_now
from parallel_clip.data.index.shard_list import ListedShard, as_text
from parallel_clip.errors import InputError
from parallel_clip.plan.resume import (
    CONFIG_FILE,
    MODEL_FILE,
    SHARDS_FILE,
    read_step,
)
from parallel_clip.plan.run_plan import RunPlan

ENVIRONMENT_FILE = "environment.json"
RESUMES_FILE = "resumes.jsonl"
METRICS_FILE = "metrics.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
SKIPPED_SAMPLES_FILE = "skipped_samples.jsonl"
LEFT_OUT_FILE = "left_out_shards.txt"
LEDGER_FOLDER = "ledger"
TENSORBOARD_FOLDER = "tensorboard"


def prepare_run_folder(
    plan: RunPlan, device: str, shards: Sequence[ListedShard] | None = None
) -> None:
    """Write the config, the environment and the lists of training shards and of those left out,
    note a resumption, and cut the logs back to the step resumed from.

    Raises:
        InputError: the folder cannot be written to.
    """
    run_dir = plan.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if plan.config.model.name == str(run_dir / MODEL_FILE):
            model = {
                "model_cfg": plan.model.json,
                "preprocess_cfg": plan.preprocess.to_openclip(),
            }
            durable.replace_text(run_dir / MODEL_FILE, json.dumps(model, indent=2) + "\n")
        durable.replace_text(run_dir / CONFIG_FILE, plan.config.to_yaml())
        if shards is not None:
            durable.replace_text(run_dir / SHARDS_FILE, as_text(shards))
        if plan.left_out:
            durable.replace_text(run_dir / LEFT_OUT_FILE, "\n".join(plan.left_out) + "\n")
        environment = json.dumps(environment_of(plan, device), indent=2)
        durable.replace_text(run_dir / ENVIRONMENT_FILE, environment + "\n")
        names = METRICS_FILE, EVALUATIONS_FILE, BAD_SAMPLES_FILE, SKIPPED_SAMPLES_FILE
        for log in (
            *(run_dir / name for name in names),
            *(run_dir / LEDGER_FOLDER).glob("*.jsonl"),
        ):
            if log.is_file():
                truncate_log(log, plan.resume.step)
        if plan.resume.checkpoint is not None:
            _note_resumption(plan)
    except OSError as error:  # what permissions do not tell: a quota, a full disk
        raise InputError(
            f"run_dir {run_dir} cannot be written to: {error.strerror}; make room, or choose "
            "another run_dir"
        ) from None


def truncate_log(log: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; drop those that a crash left incomplete."""
    steps = ((line, read_step(line)) for line in log.read_text(errors="replace").splitlines())
    kept = [line for line, of_step in steps if of_step is not None and of_step <= step]
    durable.replace_text(log, "".join(line + "\n" for line in kept))


def environment_of(plan: RunPlan, device: str) -> dict:
    """What a run runs on, ready for JSON."""
    packages = dict(plan.versions)
    return {
        "parallel_clip": packages.pop("parallel_clip"),
        "python": packages.pop("python"),
        "packages": packages,
        "device": device,
        "world_size": plan.layout.world,
        "layout": layout_tree(plan),
        "predicted": [
            {"first_step": each.segment.first + 1, "last_step": each.segment.stop}
            | each.prediction.tree()
            for each in plan.segments
            if each.prediction is not None
        ],
    }


def layout_tree(plan: RunPlan) -> dict:
    """The layout, ready for JSON."""
    layout = asdict(plan.layout)
    return {"data": plan.layout.data} | {k: v for k, v in layout.items() if k != "world"}


def _note_resumption(plan: RunPlan) -> None:
    noted = {
        "step": plan.resume.step,
        "time": utc_now(),
        "checkpoint": plan.resume.checkpoint.name,
        "layout": layout_tree(plan),
        "versions": plan.versions,
        "changed": list(plan.resume.accepted),
    }
    with (plan.run_dir / RESUMES_FILE).open("a") as file:
        file.write(json.dumps(noted) + "\n")
