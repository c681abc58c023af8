"""The golden runs: the demo's first steps in four layouts and two precisions. No torch.

A golden run is `configs/demo.yaml` with the overrides of `GoldenRun.overrides`, on the CPU with one
thread a process. `losses.json` holds what 20 steps of each gave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "configs/demo.yaml"
STEPS = 20
PRECISIONS = ("fp32", "bf16")
GOLDEN_FILE = Path(__file__).with_name("losses.json")

# Lines of metrics.jsonl have these too; they differ from one run to the next.
MEASURED = (
    "samples_per_second", "step_seconds", "data_seconds", "checkpoint_seconds", "memory_bytes",
)  # fmt: skip


class GoldenLayout(NamedTuple):
    """Sizes of data, tensor, pipeline and virtual pipeline parallelism."""

    data: int
    tensor: int
    pipeline: int
    virtual_pipeline: int

    @classmethod
    def parse(cls, name: str) -> GoldenLayout:
        """`"1211"` is data 1, tensor 2, pipeline 1, virtual pipeline 1.

        Raises:
            ValueError: `name` is not four digits, each at least 1.
        """
        if len(name) != 4 or not name.isdecimal() or "0" in name:
            raise ValueError(f"{name!r} is not a layout; write four digits, such as 1211")
        return cls(*map(int, name))

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return "".join(map(str, self))


LAYOUTS = tuple(map(GoldenLayout.parse, ("1111", "1211", "2121", "1122")))


class GoldenRun(NamedTuple):
    """A precision and a layout; sequence parallelism wherever the tensor size is above 1."""

    precision: str
    layout: GoldenLayout

    def __str__(self) -> str:
        return f"{self.precision}-{self.layout}"

    def overrides(self, run_dir: Path, steps: int = STEPS) -> list[str]:
        """Config overrides of a run of `steps` steps that does not evaluate.

        The first 5 steps are the warmup, whose learning rates do not depend on `steps`.
        """
        _, tensor, pipeline, virtual_pipeline = self.layout
        return [
            f"run_dir={run_dir}",
            f"precision={self.precision}",
            "batch.micro=16",
            f"train.steps={steps}",
            "schedule.warmup=5",
            "log.every=1",
            "checkpoint.every=10",
            "evaluate.every=0",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.virtual_pipeline={virtual_pipeline}",
            f"parallel.sequence={'true' if tensor > 1 else 'false'}",
        ]


ALL_RUNS = [GoldenRun(precision, layout) for precision in PRECISIONS for layout in LAYOUTS]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` without what was measured on the machine."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in lines
    ]


def golden_metrics(run: GoldenRun) -> list[dict[str, float]]:
    """Step, loss and gradient norm of each step of `run`, from `losses.json`."""
    columns = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["runs"][str(run)]
    rows = zip(columns["loss"], columns["grad_norm"], strict=True)
    return [
        {"step": step, "loss": loss, "grad_norm": norm} for step, (loss, norm) in enumerate(rows, 1)
    ]
