"""Compare two commits, or layouts of one commit, on the demo's first steps.

    python -m tests.golden.compare BASE NEW [--layouts 1111 1211 ...]    # commits: bit for bit
    python -m tests.golden.compare COMMIT --layouts 1111 1211 ...        # layouts: within 1e-5

A commit is anything that git knows as one, and is checked out into a temporary worktree; a folder
with a checkout, such as `.`, is taken as it stands. Every golden run asked for is trained on this
machine's CPU, then metrics.jsonl (without times and memory) and every tensor of the last checkpoint
are compared: weights and both of Adam's moments. Ends with exit code 1 where anything differs.

Layouts round differently, and training amplifies the difference: AdamW divides by the size of a
gradient, however small. At this learning rate layouts agree to 1e-5 for the first steps of fp32
only, so two layouts are compared over `LAYOUT_STEPS` steps of fp32 unless asked otherwise; bf16
rounds to 8 bits and its layouts agree to some 1e-3 at best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from tests.golden.runs import (
    CONFIG,
    LAYOUTS,
    PRECISIONS,
    STEPS,
    GoldenLayout,
    GoldenRun,
    read_metrics,
)

REPOSITORY = Path(__file__).parents[2]
LAYOUT_TOLERANCE = 1e-5
LAYOUT_STEPS = 4
SHOWN = 8  # of the differences of one pair of runs


@dataclass(frozen=True)
class RunOutput:
    """What a run leaves: metrics without times, a dict a step; tensors as `KIND:NAME`, fp32."""

    metrics: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, run_dir: Path) -> RunOutput:
        """Read a run folder; tensors are those of its last checkpoint, whatever its layout."""
        checkpoints = run_dir / "checkpoints"
        folder = checkpoints / (checkpoints / "latest").read_text().strip()
        return cls(read_metrics(run_dir), read_tensors(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The full tensors of a checkpoint, put together from its index: also of commits that wrote no
    manifest, which the package's own reader does not take."""
    index = json.loads((folder / "index.json").read_text())
    tensors = {}
    for key, tensor in index.items():
        parts = []
        for piece in sorted(tensor["pieces"], key=lambda piece: piece["start"]):
            with safe_open(folder / piece["file"], framework="pt") as file:
                parts.append(file.get_tensor(piece["stored"]).float())
        tensors[key] = torch.cat(parts, tensor["axis"]) if tensor["shape"] else parts[0]
    return tensors


class Difference(NamedTuple):
    """One value or tensor that differs; `relative` is infinite where there is nothing to divide."""

    where: str
    base: str
    new: str
    relative: float


def compare(base: RunOutput, new: RunOutput, tolerance: float) -> list[Difference]:
    """All differences of two runs, metrics first, in the order of steps and tensors.

    tolerance: 0 asks for the same bits. Otherwise numbers may differ by `tolerance` relative to
    the base's; a tensor by that much as root mean squares, relative to its own or to that of all
    tensors of its kind, whichever is larger. (A bias that began at zero is a few steps of AdamW,
    which where its gradient is nearly zero are rounding; key biases have no other gradient.)
    """
    found = []
    scales = {
        kind: _root_mean_square([t for name, t in base.tensors.items() if _kind(name) == kind])
        for kind in {_kind(name) for name in base.tensors}
    }
    for where, ours, theirs in _paired(_flat_metrics(base.metrics), _flat_metrics(new.metrics)):
        if not _equal_values(ours, theirs, tolerance):
            found.append(Difference(where, repr(ours), repr(theirs), _relative(ours, theirs)))
    for where, ours, theirs in _paired(base.tensors, new.tensors):
        if ours is None or theirs is None or ours.shape != theirs.shape:
            found.append(Difference(where, _shape(ours), _shape(theirs), float("inf")))
        elif not _same_bits(ours, theirs):
            difference = _root_mean_square([theirs.double() - ours.double()])
            scale = max(_root_mean_square([ours]), scales[_kind(where)])
            relative = difference / scale if scale else float("inf")
            if not relative <= tolerance or tolerance == 0:
                unequal = f"{int((ours != theirs).sum())} of {ours.numel()} numbers"
                found.append(Difference(where, _shape(ours), unequal, relative))
    return found


def _flat_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"step 3 loss": 4.2, ...}."""
    return {f"step {line['step']} {key}": value for line in lines for key, value in line.items()}


def _paired(base: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value of base, value of new) of every key of either; a value that lacks is None."""
    for key in dict.fromkeys([*base, *new]):
        yield key, base.get(key), new.get(key)


def _equal_values(base: Any, new: Any, tolerance: float) -> bool:
    if base == new or (base != base and new != new):  # NaN is the same as NaN
        return True
    return tolerance > 0 and _relative(base, new) <= tolerance


def _relative(base: Any, new: Any) -> float:
    if not (isinstance(base, float) and isinstance(new, float)) or base == 0:
        return float("inf")
    return abs(new - base) / abs(base)


def _kind(name: str) -> str:
    """`weight` of `weight:visual.proj`."""
    return name.partition(":")[0]


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Over the elements of all of them, in fp64."""
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return math.sqrt(squares / sum(tensor.numel() for tensor in tensors))


def _same_bits(base: Tensor, new: Tensor) -> bool:
    return torch.equal(base.view(torch.int32), new.view(torch.int32))


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{list(tensor.shape)}"


def train(run: GoldenRun, checkout: Path, folder: Path, steps: int) -> RunOutput:
    """Train a golden run with the code of `checkout`, on the CPU; its run folder goes to `folder`.

    Raises:
        SystemExit: the training failed; its output has been printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(run.layout.world), "-m", "parallel_clip", "train", CONFIG]
    command += run.overrides(folder, steps)
    own = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=checkout, env=os.environ | own, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\n{run} failed in {checkout}: exit code {done.returncode}")
    return RunOutput.read(folder)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the code of `commit`: a worktree that is removed afterwards.

    Raises:
        SystemExit: git does not know the commit.
    """
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder = Path(temporary) / "checkout"
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", folder, commit], capture_output=True, text=True
        )
        if added.returncode:
            sys.exit(f"cannot check {commit} out: {added.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def report(comparisons: Mapping[str, list[Difference]], tolerance: float) -> int:
    """Print a table of where runs differ; 0 where all agree, otherwise 1: the exit code."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    table = Table("runs", "differences", "where", "base", "new", "relative")
    for name, differences in comparisons.items():
        if not differences:
            table.add_row(name, "none", "", "", "", "")
        for number, found in enumerate(differences[:SHOWN]):
            title = (name, str(len(differences))) if number == 0 else ("", "")
            table.add_row(*title, found.where, found.base, found.new, f"{found.relative:.1e}")
    console.print(table)
    differ = [name for name, differences in comparisons.items() if differences]
    allowed = f"to {tolerance:g} relative" if tolerance else "bit for bit"
    console.print(f"{len(comparisons) - len(differ)} of {len(comparisons)} agree {allowed}")
    return 1 if differ else 0


def compare_commits(base: str, new: str, runs: Sequence[GoldenRun], steps: int) -> int:
    """Train every run with both commits and compare them bit for bit; the exit code."""
    comparisons = {}
    with (
        checked_out(base) as old, checked_out(new) as fresh,
        tempfile.TemporaryDirectory(prefix="golden-runs-") as temporary,
    ):  # fmt: skip
        folder = Path(temporary)
        for run in runs:
            outputs = [
                train(run, checkout, folder / f"{run}-{side}", steps)
                for side, checkout in (("base", old), ("new", fresh))
            ]
            comparisons[str(run)] = compare(*outputs, tolerance=0)
    return report(comparisons, 0)


def compare_layouts(commit: str, runs: Sequence[GoldenRun], steps: int) -> int:
    """Train every run with one commit and compare each layout with the first; the exit code."""
    comparisons = {}
    with checked_out(commit) as checkout, tempfile.TemporaryDirectory() as temporary:
        outputs = {run: train(run, checkout, Path(temporary) / str(run), steps) for run in runs}
    for run in runs:
        first = next(other for other in runs if other.precision == run.precision)
        if run != first:
            found = compare(outputs[first], outputs[run], LAYOUT_TOLERANCE)
            comparisons[f"{first} and {run.layout}"] = found
    return report(comparisons, LAYOUT_TOLERANCE)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """base, new (None: layouts of `base`), layouts, precision, steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit, or a folder with a checkout")
    parser.add_argument("new", nargs="?", help="another; left out: layouts of BASE are compared")
    parser.add_argument(
        "--layouts", nargs="+", type=GoldenLayout.parse, default=LAYOUTS, metavar="DTPV",
        help="digits of data, tensor, pipeline and virtual pipeline (default: all four)",
    )  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args(words)
    if options.new is None and len(options.layouts) < 2:
        parser.error("two layouts at least, or two commits")
    layouts_only = options.new is None
    options.precision = options.precision or (["fp32"] if layouts_only else list(PRECISIONS))
    options.steps = options.steps or (LAYOUT_STEPS if layouts_only else STEPS)
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse_arguments(words)
    runs = [GoldenRun(p, layout) for p in options.precision for layout in options.layouts]
    if options.new is None:
        return compare_layouts(options.base, runs, options.steps)
    return compare_commits(options.base, options.new, runs, options.steps)


if __name__ == "__main__":
    sys.exit(main())
