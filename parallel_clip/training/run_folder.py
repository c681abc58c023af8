"""The files of a run folder, and how they are prepared. All of it happens on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from parallel_clip import __version__
from parallel_clip.config import Config
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.plan.resume import CONFIG_FILE

ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
LEDGER_FOLDER = "ledger"
TENSORBOARD_FOLDER = "tensorboard"


def prepare_run_folder(config: Config, layout: Layout, device: str, resumed_step: int) -> None:
    """Write the config and the environment, and truncate the logs to the step resumed from."""
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
            truncate_log(log, resumed_step)


def truncate_log(log: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; drop those that a crash left incomplete."""
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
            name: getattr(layout, name)
            for name in ("data", "tensor", "pipeline", "virtual_pipeline", "sequence")
        },
    }
