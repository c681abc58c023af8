"""Where a run resumes: its newest checkpoint, and whether this config may continue from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import Config, load_config, resume_differences
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.openclip_json import architecture_from_json

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class ResumePoint:
    """The newest complete checkpoint (None: train from the beginning) and what it says of the run.

    data: the fingerprint of the data that its order of samples was computed from.
    """

    checkpoint: Path | None = None
    step: int = 0
    bad_samples: int = 0
    source_samples: tuple[int, ...] = ()
    data: dict[str, Any] | None = None


def find_resume_point(config: Config, architecture: Architecture) -> ResumePoint:
    """Look into `run_dir` and check that this config may resume what is there. Writes nothing.

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
            heading = (
                f"{run_dir} holds a run of another config; choose another run_dir, or undo what "
                "differs (saved → new):"
            )
            raise InputError("\n- ".join([heading, *differences]))
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


def _check_writable(run_dir: Path) -> None:
    existing = next(p for p in [run_dir, *run_dir.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise InputError(f"run_dir {run_dir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"run_dir {run_dir}: no permission to write in {existing}; choose another run_dir"
        )


def require_same_data(resume: ResumePoint, data_fingerprint: dict[str, Any]) -> None:
    """Check that a run resumes over the samples that it began with: with others the order would be
    another one, and some would come twice and some never.

    Raises:
        InputError: a source has other shards than when the checkpoint was written.
    """
    if resume.step == 0 or resume.data == data_fingerprint:
        return
    before = resume.data or {}
    if before.get("order") != data_fingerprint["order"]:
        raise InputError(
            f"{resume.checkpoint} was written by a version of parallel_clip that puts samples in "
            "another order; go on with that version, or begin a new run from its weights: "
            f"init.from={resume.checkpoint}"
        )
    changed = [
        f"source {number} had {old['samples']:,} samples in {old['shards']:,} shards, and now has "
        f"{new['samples']:,} in {new['shards']:,}"
        + (" of other sizes" if old["samples"] == new["samples"] else "")
        for number, (old, new) in enumerate(
            zip(before["sources"], data_fingerprint["sources"], strict=True)
        )
        if old != new
    ]
    raise InputError(
        f"the training data are not those of {resume.checkpoint}: {'; '.join(changed)}. Restore "
        f"them, or begin a new run from its weights: init.from={resume.checkpoint}"
    )
