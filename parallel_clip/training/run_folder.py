"""The run folder: whose it is, what has been done in it, and what may go on in it.

Everything here happens on rank 0; nothing is ever overwritten silently.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_clip import __version__
from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import Config, load_config, resume_differences
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.model.architectures import Architecture, architecture_from_json

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
LEDGER_FOLDER = "ledger"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True)
class ResumePoint:
    """Where to go on: the newest complete checkpoint (None: from the beginning) and its facts."""

    checkpoint: Path | None = None
    step: int = 0
    bad_samples: int = 0
    source_samples: tuple[int, ...] = ()
    data: dict[str, Any] | None = None  # what the order of its samples was made of


def find_resume_point(config: Config, architecture: Architecture) -> ResumePoint:
    """See what is in `run_dir` and whether this config may go on with it. Writes nothing.

    Raises:
        InputError: the folder belongs to a run of another config or model, or to something else.
    """
    run_dir = Path(config.run_dir)
    _check_writable(run_dir)
    saved = run_dir / CONFIG_FILE
    newest = commit.latest(run_dir)
    if saved.is_file():
        differences = resume_differences(load_config(saved), config)
        if differences:
            raise InputError(
                "\n- ".join(
                    [
                        f"{run_dir} holds a run of another config; choose another run_dir, or "
                        "undo what differs (saved → new):",
                        *differences,
                    ]
                )
            )
    elif newest is None and run_dir.is_dir() and any(run_dir.iterdir()):
        raise InputError(
            f"run_dir {run_dir} is not empty and holds no run; name a new or empty folder"
        )
    if newest is None:
        return ResumePoint()
    meta = Meta.read(newest)
    if architecture_from_json(meta.model, meta.model_name) != architecture:
        raise InputError(
            f"the checkpoint {newest} is of another architecture ({meta.model_name}) than "
            f"model.name {config.model.name}; set model.name to the checkpoint's model, or choose "
            "another run_dir"
        )
    return ResumePoint(newest, meta.step, meta.bad_samples, tuple(meta.source_samples), meta.data)


def prepare(config: Config, layout: Layout, device: str, resume: ResumePoint) -> None:
    """Write the config and the environment, and cut the logs back to the step resumed from."""
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG_FILE).write_text(config.to_yaml())
    except OSError as error:  # what permissions do not tell: a quota, a file system of its own kind
        raise InputError(
            f"run_dir {run_dir} cannot be written to: {error.strerror}; choose another run_dir"
        ) from None
    environment = json.dumps(_environment(layout, device), indent=2)
    (run_dir / ENVIRONMENT_FILE).write_text(environment + "\n")
    logs = [run_dir / METRICS_FILE, run_dir / EVALUATIONS_FILE, run_dir / BAD_SAMPLES_FILE]
    logs += sorted((run_dir / LEDGER_FOLDER).glob("*.jsonl"))
    for log in logs:
        if log.is_file():
            _cut_back(log, resume.step)


def _check_writable(run_dir: Path) -> None:
    existing = next(p for p in [run_dir, *run_dir.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise InputError(f"run_dir {run_dir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"run_dir {run_dir}: no permission to write in {existing}; choose another run_dir"
        )


def _cut_back(log: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a last line that a crash cut short goes too."""
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = log.with_suffix(".partial")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(log)


def _environment(layout: Layout, device: str) -> dict:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "torchvision", "megatron-core", "transformer-engine", "apex", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "parallel_clip": __version__,
        "python": sys.version.split()[0],
        "packages": versions,
        "device": device,
        "world_size": layout.world,
        "layout": {
            "data": layout.data,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "sequence": layout.sequence,
        },
    }
