"""Log a run on rank 0: metrics.jsonl, TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from parallel_clip.checkpoint.commit import EVALUATIONS_FILE
from parallel_clip.optimizer.update_rules import peak_scales
from parallel_clip.plan.prediction import Prediction, comparison_words
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.training.run_folder import METRICS_FILE, TENSORBOARD_FOLDER


@dataclass(frozen=True)
class StepRecord:
    """One step's own values: loss and multiplier as its forward used them, lr as its update did,
    grad_norm before clipping. complaint: why the update was left out; None: it was done."""

    loss: float
    grad_norm: float
    lr: float
    logit_scale: float
    logit_bias: float | None
    complaint: str | None = None


@dataclass
class StepTimer:
    """Time since the last line of the log, and the part of it that steps waited for data."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    data_seconds: float = 0.0
    pause_seconds: float = 0.0

    def add_step(self, data_seconds: float) -> None:
        self.steps += 1
        self.data_seconds += data_seconds

    def add_pause(self, seconds: float) -> None:
        """Time in which a checkpoint kept training waiting."""
        self.pause_seconds += seconds

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on steps: a checkpoint, an evaluation."""
        self.began += seconds

    def means(self, global_batch: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        return {
            "samples_per_second": self.steps * global_batch / elapsed,
            "step_seconds": elapsed / self.steps,
            "data_seconds": self.data_seconds / self.steps,
            "checkpoint_seconds": self.pause_seconds,
        }


class LineLog:
    """A file of JSON lines. Where a line cannot be written, as on a full disk, it is kept and
    written before the next one: a save decides whether the run goes on, not its log."""

    def __init__(self, path: Path):
        self._path = path
        self._waiting: list[str] = []

    def write(self, line: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(line) + "\n")
        whole = None
        try:
            with self._path.open("a") as file:
                whole = file.tell()
                file.writelines(self._waiting)
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"{self._path} cannot be written to, and is caught up later: {error}")
            if whole is not None:
                with suppress(OSError):
                    os.truncate(self._path, whole)  # no half of a line
        else:
            self._waiting.clear()


class RunLog:
    """Rank 0's record of the run. On other ranks there is none."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        global_batch: int,
        resumed_from: int,
        lr_scales: Mapping[str, float],
        prediction: Prediction | None = None,
    ):
        """lr_scales: further learning rates to write, by the field's name, in parts of `lr`;
        prediction: of the steps that are to come."""
        self._prediction = prediction
        self._memory_bytes = 0  # the most so far
        self._step_seconds: list[float] = []
        self._lr_scales = lr_scales
        self._total = total_steps
        self._global_batch = global_batch
        self._metrics = LineLog(run_dir / METRICS_FILE)
        self._evaluations = LineLog(run_dir / EVALUATIONS_FILE)
        self._board = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER), purge_step=resumed_from + 1 if resumed_from else None
        )

    @classmethod
    def of_plan(cls, plan: RunPlan) -> RunLog:
        """The log of the current part of a run."""
        return cls(
            plan.run_dir,
            plan.steps,
            plan.batch.global_batch,
            plan.resume.step,
            peak_scales(plan.config.optimizer),
            plan.prediction,
        )

    def write_step(
        self,
        step: int,
        record: StepRecord,
        means: dict[str, float],
        memory_bytes: int,
        bad_samples: int,
        source_samples: list[int],
    ) -> None:
        self._memory_bytes = max(self._memory_bytes, memory_bytes)
        self._step_seconds.append(means["step_seconds"])
        values = asdict(record)
        skipped = values.pop("complaint") is not None
        line = {
            "step": step,
            "samples_seen": step * self._global_batch,
            **{k: v if v is None or math.isfinite(v) else None for k, v in values.items()},
            **{name: record.lr * scale for name, scale in self._lr_scales.items()},
            **means,
            "memory_bytes": memory_bytes,
            "bad_samples": bad_samples,
        }
        if skipped:
            line["skipped"] = True
        self._metrics.write({**line, "source_samples": source_samples})
        if len(source_samples) > 1:
            line |= {f"samples_of_source_{i}": count for i, count in enumerate(source_samples)}
        with suppress(OSError):  # metrics.jsonl has it all, and tells of a full disk
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(f"train/{name}", value, step)
        if skipped:
            print(f"step {step} is left out: {record.complaint}", flush=True)
        print(self._progress_line(step, record, means, bad_samples), flush=True)

    def write_evaluation(self, step: int, results: dict, of_averages: bool = False) -> None:
        """of_averages: of `ema.decay`, which the line then says."""
        said = {"ema": True} if of_averages else {}
        self._evaluations.write({"step": step, **said, **results})
        figures = dict(_flat(results))
        with suppress(OSError):
            for name, value in figures.items():
                self._board.add_scalar(f"evaluate/{name}", value, step)
        # The whole is in the file and on the board; a line shows one figure of each kind.
        shown = "  ".join(
            f"{name.partition('/')[2] or name} {value:.4g}"
            for name, value in figures.items()
            if name.endswith(("loss", "recall@1", "top1"))
        )
        of = " of the averages" if of_averages else ""
        print(f"held out at step {step}{of}: {shown}", flush=True)

    def write_end(self, words: str | None = None) -> None:
        """Print what was predicted of memory and time beside what was measured, where there are
        both, and `words`: how the run ends."""
        if self._prediction is not None and self._step_seconds:
            seconds = median(self._step_seconds)
            print(comparison_words(self._prediction, self._memory_bytes, seconds), flush=True)
        if words is not None:
            print(words, flush=True)

    def close(self) -> None:
        with suppress(OSError):
            self._board.close()

    def _progress_line(
        self, step: int, record: StepRecord, means: dict[str, float], bad_samples: int
    ) -> str:
        left = _duration((self._total - step) * means["step_seconds"])
        parts = [
            f"step {step:>{len(str(self._total))}}/{self._total}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3g}",
            f"scale {record.logit_scale:.2f}",
            f"lr {record.lr:.2e}",
            f"{means['samples_per_second']:.0f} samples/s",
            f"{left} left",
        ]
        if means["data_seconds"] > 0.1 * means["step_seconds"]:
            parts.append(f"waiting for data {means['data_seconds'] / means['step_seconds']:.0%}")
        if bad_samples:
            parts.append(f"{bad_samples} bad samples")
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _flat(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
