"""The demos' figures: how long they take, and what each one's report says.

    python benchmarks/demo.py [demo|finetune_demo] [--run FOLDER]

Runs `launch/demo.sh`, or `launch/finetune_demo.sh` from a run of the other, from its start in a
temporary folder, times it, and writes its `report.json` with the environment to benchmarks/results,
and its picture beside it. `--run FOLDER` takes a demo that is finished instead, so that its whole
time is not known. Ends with the demo's exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment, write_results

LAUNCH = Path(__file__).parents[1] / "launch"


@dataclass(frozen=True)
class Demo:
    """script: what runs it; folder: the variable that names where; picture: of its results."""

    script: Path
    folder: str
    picture: str | None = None


DEMOS = {
    "demo": Demo(LAUNCH / "demo.sh", "RUN"),
    "finetune_demo": Demo(LAUNCH / "finetune_demo.sh", "OUT", "mixes.png"),
}


def run_demo(demo: Demo, folder: Path) -> float:
    """Seconds that a demo takes, its environment being there; what it makes goes to `folder`.

    Raises:
        SystemExit: the demo failed, with its exit code.
    """
    began = time.perf_counter()
    done = subprocess.run(
        ["bash", str(demo.script)],
        env=os.environ | {demo.folder: str(folder), "PYTHON": sys.executable},
    )
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - began


def results_of(folder: Path, seconds: float | None) -> dict[str, Any]:
    """The report of a finished demo; `seconds`: of all its parts, None where not measured."""
    report = json.loads((folder / "report.json").read_text())
    return {"environment": environment(), "seconds": seconds, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", nargs="?", choices=DEMOS, default="demo")
    parser.add_argument("--run", type=Path, help="the folder of a finished demo")
    options = parser.parse_args()
    demo = DEMOS[options.demo]
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        folder = options.run or Path(temporary) / "run"
        seconds = None if options.run else run_demo(demo, folder)
        (path,) = write_results(options.demo.replace("_", "-"), results_of(folder, seconds))
        print(path)
        if demo.picture is not None:
            print(shutil.copyfile(folder / demo.picture, path.with_suffix(".png")))


if __name__ == "__main__":
    main()
