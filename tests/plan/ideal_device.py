"""A device without losses: products run at its peak and all else takes no time, but for what a test
changes. Times of a step on it have closed forms."""

from __future__ import annotations

from typing import Any

from parallel_clip.plan.device_file import Device, device_from_dict

PEAK = 1e12
NO_TIME = 1e-30
AT_ONCE = 1e30

FULL_RATE = {"peak": PEAK, "products": [[1.0, 1.0]], "attention": [[1, 1.0, 1.0]]}
IDEAL = {
    "name": "ideal",
    "memory_bandwidth": AT_ONCE,
    "streamed": 1.0,
    "activated": 1.0,
    "operation_seconds": NO_TIME,
    "bf16": FULL_RATE,
    "fp32": FULL_RATE,
    "inside": {"bandwidth": AT_ONCE, "reached": 1.0, "latency": NO_TIME},
    "between": {"bandwidth": AT_ONCE, "reached": 1.0, "latency": NO_TIME},
}


def ideal_device(**changes: Any) -> Device:
    tree = IDEAL | changes
    sources = {key: "made up" for key in tree if key != "name"}
    return device_from_dict(tree | {"sources": sources}, "the test's device")


def link(bandwidth: float, latency: float = NO_TIME) -> dict[str, float]:
    return {"bandwidth": bandwidth, "reached": 1.0, "latency": latency}
