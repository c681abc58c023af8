"""The demo's figures: how long it takes, recall on unseen concepts, OpenCLIP's features and ours.

    python benchmarks/demo.py [--run FOLDER]

Runs `launch/demo.sh` from its start in a temporary folder, times it, and writes its `report.json`
with the environment to benchmarks/results. `--run FOLDER` takes a demo that is finished instead, so
that its whole time is not known. Ends with the demo's exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, write_results

DEMO = Path(__file__).parents[1] / "launch/demo.sh"


def run_demo(run: Path) -> float:
    """Seconds that the demo takes, its environment being there; it trains into the folder `run`.

    Raises:
        SystemExit: the demo failed, with its exit code.
    """
    began = time.perf_counter()
    done = subprocess.run(
        ["bash", str(DEMO)], env=os.environ | {"RUN": str(run), "PYTHON": sys.executable}
    )
    if done.returncode:
        sys.exit(done.returncode)
    return time.perf_counter() - began


def results_of(run: Path, seconds: float | None) -> dict[str, Any]:
    """The report of a finished demo; `seconds`: of all its parts, None where not measured."""
    report = json.loads((run / "report.json").read_text())
    return {"environment": environment(), "seconds": seconds, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="the folder of a finished demo")
    finished = parser.parse_args().run
    with tempfile.TemporaryDirectory(prefix="demo-") as temporary:
        run = finished or Path(temporary) / "run"
        results = results_of(run, None if finished else run_demo(run))
    for path in write_results("demo", results):
        print(path)


if __name__ == "__main__":
    main()
