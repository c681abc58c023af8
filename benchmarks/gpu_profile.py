"""Where the time of a step goes on a GPU: idle share, top kernels, host syncs; by torch.profiler.

A profiled step is slower on the host than a plain one. Where the host is what the GPU waits for,
the idle share here is above that of a plain step.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 3
TOP = 12

# Categories of what runs on the GPU in a trace of torch.profiler. Annotations of ranges lie there
# as well and are no work.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Runtime calls for which the host stands still; a blocking copy ends in the second.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
STEP_LABEL = "profiled step"


@dataclass(frozen=True)
class TopKernel:
    """A kernel's time and calls in one step."""

    name: str
    milliseconds: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """Of one step, the mean of those profiled. idle_share: the part, 0 to 1, of the time between
    the first and the last kernel in which the GPU runs nothing; None where nothing ran on one.
    On a CPU `top` has operators, each with the time of those it calls.
    """

    idle_share: float | None
    host_syncs: float
    top: list[TopKernel]


def profile_steps(step: Callable[[], float], steps: int = STEPS) -> StepProfile:
    """Profile `steps` steps of what has been warmed up."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP_LABEL):
                step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return summarize(events, steps)


def summarize(events: Sequence[dict[str, Any]], steps: int) -> StepProfile:
    """events: those of a Chrome trace; `ts` and `dur` in microseconds."""
    timed = [event for event in events if event.get("ph") == "X"]
    on_device = [event for event in timed if event.get("cat") in ON_DEVICE]
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in timed
        if event.get("cat") == "user_annotation" and event["name"] == STEP_LABEL
    ]
    waits = sum(
        event["name"] in WAITS and any(start <= event["ts"] <= end for start, end in ranges)
        for event in timed
        if event.get("cat") == "cuda_runtime"
    )
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in on_device]
    counted = on_device or [event for event in timed if event.get("cat") == "cpu_op"]
    return StepProfile(idle_share(spans), waits / steps, _top(counted, steps))


def idle_share(spans: Iterable[tuple[float, float]]) -> float | None:
    """The part of the time from the first start to the last end that no span covers. Spans of
    several streams may overlap."""
    ordered = sorted(spans)
    if not ordered:
        return None
    first = until = ordered[0][0]
    idle = 0.0
    for start, end in ordered:
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle / (until - first) if until > first else 0.0


def _top(events: Iterable[dict[str, Any]], steps: int) -> list[TopKernel]:
    microseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        microseconds[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    names = sorted(microseconds, key=microseconds.__getitem__, reverse=True)[:TOP]
    return [
        TopKernel(name, microseconds[name] / 1000 / steps, calls[name] / steps) for name in names
    ]
