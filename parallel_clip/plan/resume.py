"""Where a run resumes: its newest checkpoint, and whether this config may continue from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from parallel_clip.checkpoint import commit, durable
from parallel_clip.checkpoint.commit import EVALUATIONS_FILE
from parallel_clip.checkpoint.manifest import MANIFEST_FILE, Manifest
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import PIECE_SUFFIX
from parallel_clip.config import (
    Config,
    config_from_dict,
    is_allowed,
    load_config,
    resume_differences,
)
from parallel_clip.errors import InputError

CONFIG_FILE = "config.yaml"
SHARDS_FILE = "shards.tsv"  # the training shards that the run is over
MODEL_FILE = "model.json"  # of a model that is not known by name
RUN_FILES = (
    CONFIG_FILE,
    MODEL_FILE,
    "lease",
    "status.json",
)  # of which any shows that a folder is a run's


@dataclass(frozen=True)
class ResumePoint:
    """The newest complete checkpoint (None: train from the beginning) and what it says of the run.

    manifest_hash: of the checkpoint's manifest, by which ranks compare what they see; accepted:
    the differences of the config that `resume.allow` lets through; is_evaluated: whether the log
    has an evaluation of this step.
    """

    checkpoint: Path | None = None
    meta: Meta | None = None
    manifest_hash: str | None = None
    accepted: tuple[str, ...] = ()
    is_evaluated: bool = False

    @property
    def step(self) -> int:
        return 0 if self.meta is None else self.meta.step


def find_resume_point(
    config: Config,
    *,
    before: int | None = None,
    say: Callable[[str], None] = print,
) -> ResumePoint:
    """Look into `run_dir` and check that this config may resume what is there. Writes nothing.

    before: take a checkpoint of an earlier step than this. A checkpoint of which a file other than
    the tensors is damaged is passed over where `checkpoint.fallback` says so.

    Raises:
        InputError: the folder belongs to a run of another config, or to something else, or its
            newest checkpoint is damaged.
    """
    run_dir = Path(config.run_dir)
    _check_writable(run_dir)
    newest = commit.latest(run_dir)
    if newest is None:
        _check_new_run(run_dir, config)
        return ResumePoint()
    if not (newest.parent / commit.LATEST).is_file():
        say(f"{newest.parent} has no file {commit.LATEST}; going on from the newest, {newest.name}")
    meta, damage = None, None
    for folder in reversed(commit.step_folders(run_dir)):
        step = commit.step_of(folder)
        if step > commit.step_of(newest) or before is not None and step >= before:
            continue
        try:
            manifest = Manifest.read(folder)
            # Pieces are verified by all ranks together, later; a plan is made of the rest.
            manifest.verify(folder, [n for n in manifest.files if not n.endswith(PIECE_SUFFIX)])
            meta = Meta.read(folder)
            break
        except InputError as error:
            damage = damage or error
            fall_back(config, error, say)
    if meta is None:
        raise damage or InputError(f"{run_dir} has no checkpoint before step {before}")
    accepted: list[str] = []
    if meta.config is not None:
        accepted = _check_same_run(run_dir, config_from_dict(meta.config), config)
    elif meta.position != meta.step * config.batch.global_:  # of a conversion, which has no config
        raise InputError(
            f"{folder} was converted from a run whose batch was {meta.position // meta.step:,} "
            f"pairs, and batch.global is {config.batch.global_:,}; set it to that, or begin a new "
            f"run from the weights: init.from={run_dir}"
        )
    if meta.config is None and config.ema.decay is not None and not is_allowed("ema.decay", config):
        raise InputError(
            f"{folder} is of a conversion and has no averages of weights for ema.decay "
            f"{config.ema.decay:g}; resume.allow=[ema] starts them from its weights"
        )
    manifest_hash = durable.hash_file(folder / MANIFEST_FILE).hash
    is_evaluated = _is_evaluated(run_dir / EVALUATIONS_FILE, meta.step)
    return ResumePoint(folder, meta, manifest_hash, tuple(accepted), is_evaluated)


def fall_back(config: Config, damage: InputError, say: Callable[[str], None]) -> None:
    """Tell that the checkpoint before a damaged one is taken; InputError where
    `checkpoint.fallback` does not allow it."""
    if not config.checkpoint.fallback:
        raise InputError(
            f"{damage}, or set checkpoint.fallback=true to go on from the one before"
        ) from None
    say(f"{damage}: checkpoint.fallback takes the one before")


def _is_evaluated(log: Path, step: int) -> bool:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return any(read_step(line) == step for line in lines)


def read_step(line: str) -> int | None:
    """The step of a line of JSON in a log; None: a crash left it incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _check_new_run(run_dir: Path, config: Config) -> None:
    """Of a folder without a checkpoint: it is new, empty, or that of a run that had not come to
    one."""
    saved = run_dir / CONFIG_FILE
    if saved.is_file():
        try:
            before = load_config(saved)
        except InputError as error:
            raise InputError(
                f"{saved} is damaged, and {run_dir} has no checkpoint: remove the folder to begin "
                f"anew, or choose another run_dir ({error})"
            ) from None
        _check_same_run(run_dir, before, config)
    elif run_dir.is_dir():
        others = [
            f for f in run_dir.iterdir() if f.name not in RUN_FILES and f.suffix != ".partial"
        ]
        if others:
            raise InputError(
                f"run_dir {run_dir} is not empty and holds no run; name a new or empty folder"
            )


def _check_same_run(run_dir: Path, before: Config, config: Config) -> list[str]:
    """The differences that are accepted; InputError where others are there. A `model.name` that is
    left out is the run's own, and so are sizes that are left out with it."""
    if config.model.name is None:
        given = config.model.model_dump(include={"image_size", "context_length"}, exclude_none=True)
        own = before.model.model_copy(update=given)
        config = config.model_copy(update={"model": own})
    refused, accepted = resume_differences(before, config)
    if refused:
        heading = (
            f"{run_dir} holds a run of another config; choose another run_dir, undo what differs "
            "(saved → new), or name it in resume.allow:"
        )
        raise InputError("\n- ".join([heading, *refused]))
    return accepted


def _check_writable(run_dir: Path) -> None:
    existing = next(p for p in [run_dir, *run_dir.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise InputError(f"run_dir {run_dir}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"run_dir {run_dir}: no permission to write in {existing}; choose another run_dir"
        )
