"""What every benchmark says about where it ran, and where its results go."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("the pictures of benchmarks need matplotlib: pip install 'parallel_clip[benchmark]'")

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "open_clip_torch", "transformer-engine")


def environment() -> dict[str, Any]:
    """Versions and machine: what a reader needs to judge a figure, or to measure it again."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def describe(environment: dict[str, Any]) -> str:
    """The environment in one line, for the foot of a table or a picture."""
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v)
    gpus = environment["gpus"]
    machine = (
        f"{len(gpus)} x {gpus[0]}"
        if gpus
        else f"{environment['processor']}, {environment['threads']} threads"
    )
    return f"{environment['date']}, {machine}; Python {environment['python']}, {versions}"


def write_results(
    name: str, results: dict[str, Any], figure: Figure | None = None
) -> tuple[Path, ...]:
    """Writes `results/<date>-<name>.json` and the picture, if any, beside it; returns the paths."""
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{results['environment']['date']}-{name}"
    json_path, picture_path = stem.with_suffix(".json"), stem.with_suffix(".png")
    json_path.write_text(json.dumps(results, indent=1) + "\n")
    if figure is None:
        return (json_path,)
    figure.savefig(picture_path, dpi=150, bbox_inches="tight")
    return json_path, picture_path


def _processor() -> str:
    """The CPU's model name; `platform.processor()` is empty on most Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
