"""How benchmarks/gpu.py measures: times in alternation, memory alone, and what MFU means there."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_profile import StepProfile, profile_steps
from gpu_subjects import Case, Step, Subject

from parallel_clip.engine import device as device_seam
from parallel_clip.model.architecture import Architecture
from parallel_clip.stages.costs import stage_cost
from parallel_clip.stages.stage import whole_model

OUT_OF_MEMORY = "out of memory"
WARMUP_STEPS = 3  # of which the first compiles, makes the optimizer's state and chooses kernels

# Dense bf16 FLOP/s of NVIDIA's data sheets, by the name that CUDA gives the card. Others are given
# by --peak-tflops.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
}


@dataclass
class Row:
    """A subject in a case. seconds: of a step, a round each; partner_seconds: of the first
    subject's step in the same round, empty where it had no room beside; peak_bytes: of the subject
    alone; failed: why there is no more. On a CPU the peak is that of the process so far."""

    subject: str
    failed: str | None = None
    first_loss: float | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    partner_seconds: list[float] = field(default_factory=list)
    profile: StepProfile | None = None
    profile_failed: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float | None:
        """The median over rounds of this step's time relative to the partner's."""
        if not self.partner_seconds:
            return None
        pairs = zip(self.seconds, self.partner_seconds, strict=True)
        return statistics.median(own / partner for own, partner in pairs)


def in_short(error: Exception) -> str:
    """The kind of an error and its first line."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first[:120]}"


def flops_per_pair(architecture: Architecture, batch: int) -> int:
    """FLOPs that one pair of a step needs, by hand; what is computed again does not count.

    Three times the forward's matrix products (stages/costs.py), as the backward has two for each,
    less one of the patch convolution, whose pictures need no gradient; and of the loss over a batch
    of B pairs three products of 2BD a pair: logits, and the gradients of both features.
    """
    costs = architecture.costs
    forward = stage_cost(whole_model(costs.vision.layers, costs.text.layers), costs)
    return 3 * forward - costs.vision.embedding + 6 * batch * costs.embed_dim


def utilization(architecture: Architecture, batch: int, seconds: float, peak: float) -> float:
    """MFU = FLOPs a pair × pairs a step / (seconds of a step × peak FLOP/s)."""
    return flops_per_pair(architecture, batch) * batch / (seconds * peak)


def measured_peak(device: torch.device, size: int, rounds: int = 10) -> float:
    """FLOP/s of a bf16 product of two matrices [size, size]: what this card reaches at its best,
    clocks and power limit included."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: a @ b) for _ in range(rounds)]
    return 2 * size**3 / min(times)


def timed(work: Callable[[], object]) -> float:
    """Seconds, between two events on the GPU's stream; by the clock where there is no GPU."""
    if not device_seam.has_cuda():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def measure(subject: Subject, partner: Subject, case: Case, rounds: int) -> Row:
    """Memory of the subject alone, then its time in turns with the partner's.

    An error ends a subject and not the benchmark: the hour on the card is for what does run.
    """
    row = Row(subject.name)
    step = other = None
    try:
        step = _prepare(subject, case, row)
        if subject.name != partner.name:
            other = _beside(partner, case)
        if not _time(row, step, other, rounds) and other is not None:
            other = None
            free_memory()
            _time(row, step, None, rounds)
        if not row.seconds:
            row.failed = OUT_OF_MEMORY
    except torch.OutOfMemoryError:
        row.failed = OUT_OF_MEMORY
    except Exception as error:
        row.failed = in_short(error)
    if row.seconds and subject.is_profiled:
        other = None
        try:
            row.profile = profile_steps(step)
        except Exception as error:  # the times stand
            row.profile_failed = in_short(error)
    step = other = None
    torch._dynamo.reset()  # what was compiled holds its model
    free_memory()
    return row


def _prepare(subject: Subject, case: Case, row: Row) -> Step:
    """Build and warm up; notes the first loss and the peak of one step."""
    step = subject.build(case)
    row.first_loss = step()
    for _ in range(WARMUP_STEPS - 1):
        step()
    device_seam.synchronize()
    device_seam.reset_peak_memory()
    step()
    row.peak_bytes = device_seam.peak_memory_bytes()
    return step


def _beside(partner: Subject, case: Case) -> Step | None:
    """The partner's step, warmed up; None where there is no room for both."""
    try:
        step = partner.build(case)
        for _ in range(WARMUP_STEPS):
            step()
        return step
    except torch.OutOfMemoryError:
        pass
    free_memory()
    return None


def _time(row: Row, step: Step, partner: Step | None, rounds: int) -> bool:
    """Note the times of all rounds; False, and none, where memory ran out."""
    turns = [(step, row.seconds)]
    if partner is not None:
        turns.append((partner, row.partner_seconds))
    try:
        for number in range(rounds):
            for work, seconds in turns if number % 2 else reversed(turns):
                seconds.append(timed(work))
        return True
    except torch.OutOfMemoryError:
        # The next try is not made in here: the traceback holds what the step had allocated.
        row.seconds.clear()
        row.partner_seconds.clear()
        return False


def free_memory() -> None:
    """Give back what nobody uses any more: models are in cycles of references."""
    gc.collect()
    torch.cuda.empty_cache()


def describe_card() -> dict[str, Any]:
    """The card, its driver and limits, and the libraries below torch; empty on a CPU."""
    if not device_seam.has_cuda():
        return {}
    fields = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    index = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    query = ["nvidia-smi", f"--id=GPU-{index}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        said = dict(zip(fields, map(str.strip, done.stdout.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):
        said = {"name": torch.cuda.get_device_name()}
    return said | {
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }
