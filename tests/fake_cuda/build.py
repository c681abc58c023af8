"""Builds a CUDA runtime and driver that run nothing, so that torch believes it has one H100.

    python -m tests.fake_cuda.build FOLDER

`environment` is that of a process which is to believe it. Needs gcc with binutils, the headers of
CUDA's runtime, which come with torch, and a build of torch for CUDA 13.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).with_name("stubs")
PACKAGES = Path(sysconfig.get_path("purelib"))
CUDA_MAJOR = 13  # the stubs have its functions' names and arguments
RUNTIME, DRIVER = "libcudart_stub.so", "libcuda.so.1"
HEADERS = "driver_types.h", "crt/host_defines.h"


class CannotBuild(Exception):
    """What is missing, in words."""


def why_not() -> str | None:
    """What the stubs cannot be built for, or used with, here; None: nothing is missing."""
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            return f"needs {program}: install gcc"
    import torch

    cuda = torch.version.cuda
    if cuda is None or int(cuda.split(".")[0]) != CUDA_MAJOR:
        return f"needs a torch for CUDA {CUDA_MAJOR}; this one is for {cuda or 'CPUs'}"
    return None


def build(folder: Path) -> None:
    """Write both libraries to `folder`. Raises CannotBuild."""
    includes = [f"-I{folder_of(header)}" for header in HEADERS]
    wanted = set(_undefined_names())
    for source, prefix, library, options in (
        ("runtime.c", "cuda", RUNTIME, ["-ldl"]),
        ("driver.c", "cu", DRIVER, [f"-Wl,-soname,{DRIVER}"]),
    ):
        code = (SOURCES / source).read_text()
        defined = set(re.findall(rf"\b({prefix}[A-Z]\w*)\(", code))
        missing = sorted(n for n in wanted - defined if re.match(f"{prefix}[A-Z](?!ile)", n))
        code += "".join(f"int {name}(void) {{ return 0; }}\n" for name in missing)
        whole = folder / source
        whole.write_text(code)
        _run("gcc", "-w", "-shared", "-fPIC", *includes, "-o", folder / library, whole, *options)


def environment(folder: Path) -> dict[str, str]:
    """Of a process whose torch is to find the stubs in `folder`."""
    elsewhere = os.environ.get("LD_LIBRARY_PATH")
    return os.environ | {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": f"{folder}:{elsewhere}" if elsewhere else str(folder),
        "CUDA_VISIBLE_DEVICES": "0",
    }


def folder_of(header: str) -> Path:
    """The include folder that has `header`: of torch's own packages before the machine's."""
    places = [PACKAGES / "nvidia", PACKAGES / "triton"]
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    for place in places:
        for found in sorted(place.rglob(header)):
            if "amd" not in found.parts:
                return found.parents[header.count("/")]
    raise CannotBuild(
        f"no {header} in {', '.join(map(str, places))}; pip install nvidia-cuda-runtime "
        "nvidia-cuda-crt, or set CUDA_HOME"
    )


def _undefined_names() -> Iterator[str]:
    """All that torch's libraries want of others."""
    libraries = sorted((PACKAGES / "torch" / "lib").glob("*.so"))
    if not libraries:
        raise CannotBuild(f"no libraries of torch in {PACKAGES}")
    for library in libraries:
        for line in _run("nm", "-D", "--undefined-only", library).splitlines():
            kind, _, name = line.strip().partition(" ")
            if kind == "U":
                yield name.partition("@")[0]


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    build(target)
