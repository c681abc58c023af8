"""What is predicted of the steps of a run, memory and seconds, in words and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from parallel_clip.plan.memory_limit import MemoryLimit
from parallel_clip.plan.rank_bytes import RankBytes

_GB = 1e9


@dataclass(frozen=True)
class Prediction:
    """Of a step of a segment. stage: the one that fills most; memory: what a rank of it fills;
    limit: what a rank has, None: not known; on_gpu: whether both are a GPU's; seconds: of a step
    on `device`, by its name, None where no device's figures are known."""

    stage: int
    memory: RankBytes
    limit: MemoryLimit | None
    on_gpu: bool
    seconds: float | None = None
    device: str | None = None

    @property
    def is_too_much(self) -> bool:
        return self.limit is not None and self.memory.total > self.limit.size

    @property
    def metrics_bytes(self) -> int:
        """What `memory_bytes` of metrics.jsonl is predicted to be."""
        return self.memory.seen_by_metrics(self.on_gpu)

    def tree(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "stage": self.stage,
            "memory_bytes": asdict(self.memory) | {"total": self.memory.total},
            "metrics_memory_bytes": self.metrics_bytes,
            "limit_bytes": self.limit.size if self.limit is not None else None,
            "step_seconds": self.seconds,
            "device": self.device,
        }


def prediction_words(prediction: Prediction, stages: int, pairs: int) -> list[str]:
    """A line of memory and, where it is known, one of time. pairs: of the global batch."""
    where = f" on stage {prediction.stage}, the fullest" if stages > 1 else ""
    lines = [f"predicted memory{where}: {memory_words(prediction)}"]
    if prediction.seconds is not None:
        lines.append(
            f"predicted step: {prediction.seconds:.3g} s, {pairs / prediction.seconds:,.0f} "
            f"samples/s on {prediction.device}, data being there in time"
        )
    return lines


def memory_words(prediction: Prediction) -> str:
    """'5.36 GB (weights 0.61, ...), of 18.50 GB: ...'."""
    memory, limit = prediction.memory, prediction.limit
    kinds = {kind: size for kind, size in asdict(memory).items() if size >= 0.005 * _GB}
    listed = ", ".join(f"{kind} {size / _GB:.2f}" for kind, size in kinds.items())
    words = f"{memory.total / _GB:.2f} GB ({listed})" if listed else f"{memory.total / _GB:.2f} GB"
    return (
        words if limit is None else f"{words}; a rank has {limit.size / _GB:.2f} GB, {limit.words}"
    )


def comparison_words(prediction: Prediction, memory_bytes: int, seconds: float) -> str:
    """What was predicted beside the largest `memory_bytes` and the median `step_seconds` of
    metrics.jsonl."""
    words = f"memory {_beside(memory_bytes / _GB, prediction.metrics_bytes / _GB, 'GB')}"
    if prediction.seconds is not None:
        words += f"; step {_beside(seconds, prediction.seconds, 's')}"
    return words


def _beside(measured: float, predicted: float, unit: str) -> str:
    off = predicted / measured - 1
    return f"{measured:.3g} {unit} measured, {predicted:.3g} {unit} predicted ({off:+.0%})"
