"""`parallel-clip doctor`: the installed packages and devices, and what of them is used."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from parallel_clip.engine.versions import package_version

PACKAGES = (
    "torch",
    "torchvision",
    "megatron-core",
    "webdataset",
    "open_clip_torch",
    "transformer-engine",
    "apex",
)


def doctor_report() -> str:
    """One line a package, then the devices and the shared memory that data workers need."""
    lines = []
    for package in PACKAGES:
        lines.append(f"{package:20} {package_version(package) or 'not installed'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    none = "none: training runs on the CPU over gloo"
    lines.append(f"{'devices':20} {', '.join(devices) or none}")
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free / 2**30
        enough = "" if free >= 1 else "; data workers need more: docker run --ipc=host"
        lines.append(f"{'shared memory':20} {free:.1f} GiB free{enough}")
    return "\n".join(lines)
