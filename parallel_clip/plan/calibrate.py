"""Measure this machine, and write the figures as a device file.

Single operations are timed, and links where there are several processes. One real step of a small
model then says by how much a step takes longer than its operations by themselves: `overhead`. All
processes measure at once, since those of a machine share its memory. Takes about a minute.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.config import config_from_dict
from parallel_clip.config.file import write_yaml
from parallel_clip.engine.device import describe_device, has_cuda, host_name
from parallel_clip.engine.groups import Groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.plan.collective_time import ring_bytes
from parallel_clip.plan.device_file import Device, device_from_dict, device_names, read_device
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.plan.step_time import predict_step
from parallel_clip.plan.timed_step import Clock, slowest_of_ranks, timed_steps

REPEATS = 7

# Rows, columns and inner size of products; those of a GPU reach the size of a block of bigG.
CPU_PRODUCTS = [(64, 64, 64), (128, 256, 256), (400, 768, 768), (800, 2304, 768)]
GPU_PRODUCTS = [
    (256, 256, 256), (512, 1024, 512), (1024, 2048, 1024), (4096, 2048, 1024), (8192, 4096, 1280),
    (16384, 8192, 1664),
]  # fmt: skip
TOKENS = [50, 77, 257, 577]
HEAD_WIDTH = 64


def calibrate(path: str | Path, launch: Launch) -> Device:
    """Measure, and write the file on rank 0. Called by all processes that were started.

    Raises:
        InputError: there is something at `path` already, or its folder is not there.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} is there already; give another name, or remove it first")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    join_world(launch)
    groups = make_groups(Layout(launch.world_size))
    tree = measure_device(groups, launch)
    if groups.is_rank_zero:
        path.write_text(write_yaml(tree), encoding="utf-8")
    return device_from_dict(tree, str(path))


def measure_device(
    groups: Groups, launch: Launch, quick: bool = False, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """The tree of a device file; the same on all ranks. quick: the smallest sizes alone; clock: as
    in `timed_steps`."""
    timer = _Timer(groups, 1 if quick else REPEATS, clock)
    known = next((n for n in device_names() if n.upper() in describe_device().upper()), None)
    sheet = read_device(known) if known else None
    when = f"measured {datetime.date.today()} on {host_name()}, {groups.layout.world} processes"
    tree: dict[str, Any] = {"name": f"{describe_device()} of {host_name()}"}
    tree |= _memory(timer, sheet, quick)
    tree["operation_seconds"] = _operation_seconds(timer)
    for precision in ("bf16", "fp32"):
        peak = sheet.precision(precision).peak if sheet else None
        tree[precision] = _arithmetic(timer, precision, peak, quick)
    tree |= _links(timer, launch, quick)
    tree["sources"] = dict.fromkeys([key for key in tree if key != "name"], when)
    tree["overhead"] = 1.0
    tree["sources"]["overhead"] = "not measured"
    if not quick:
        tree["overhead"] = _overhead(device_from_dict(tree, "calibration"), groups, clock)
        tree["sources"]["overhead"] = f"{when}: a step of {_step_model()[0]}"
    if sheet:
        tree["sources"] |= {"memory_bandwidth": f"the data sheet, as of {known}"}
    return tree


class _Timer:
    """Times operations on this process's device, on all ranks at once."""

    def __init__(self, groups: Groups, repeats: int, clock: Clock):
        self.groups, self.device = groups, groups.device
        self.repeats, self.clock = repeats, clock

    def __call__(self, function: Callable[[], object], calls: int = 1) -> float:
        """Seconds of a call, the least of several times `calls` calls: what else runs on a machine
        makes it slower and never quicker. The same on all ranks."""

        def several() -> None:
            for _ in range(calls):
                function()

        return min(slowest_of_ranks(several, self.repeats, self.groups, self.clock)) / calls

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def _memory(timer: _Timer, sheet: Device | None, quick: bool) -> dict[str, float]:
    """Bytes a second of copies, of what streams in a block (a sum, a norm forward and backward) and
    of an activation function, forward and backward, in tensors of a microbatch's size."""
    rows = 100 if quick else 16_000 if has_cuda() else 1600
    x, wide = timer.normal(rows, 768), timer.normal(rows, 3072)
    large = timer.normal(1 << (18 if quick else 27 if has_cuda() else 23))
    target = torch.empty_like(large)
    copied = 8 * large.numel() / timer(lambda: target.copy_(large))

    def norm(input_: Tensor) -> Tensor:
        return F.layer_norm(input_, (768,))

    numbers = (3 + 2 + 4) * x.numel()
    seconds = timer(lambda: x + x) + _forward_and_backward(timer, norm, x)
    streamed = 4 * numbers / seconds
    activated = 4 * 5 * wide.numel() / _forward_and_backward(timer, F.gelu, wide)
    bandwidth = max(copied, streamed, activated)
    if sheet:
        bandwidth = max(bandwidth, sheet.memory_bandwidth)
    return {
        "memory_bandwidth": bandwidth,
        "streamed": streamed / bandwidth,
        "activated": activated / bandwidth,
    }


def _forward_and_backward(timer: _Timer, function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    input_, grad = x.clone().requires_grad_(), torch.ones_like(x)
    return timer(lambda: torch.autograd.grad(function(input_), input_, grad))


def _operation_seconds(timer: _Timer) -> float:
    one = timer.normal(1)
    return timer(lambda: one + one, calls=1000)


def _arithmetic(timer: _Timer, precision: str, peak: float | None, quick: bool) -> dict[str, Any]:
    """A section of the device file; peak: None: that of the quickest operation."""
    dtype, rates = DTYPES[precision], {}
    sizes = GPU_PRODUCTS if has_cuda() else CPU_PRODUCTS
    for rows, columns, inner in sizes[:2] if quick else sizes:
        x, weight = (
            timer.normal(rows, inner, dtype=dtype),
            timer.normal(columns, inner, dtype=dtype),
        )
        flops, bias = 2 * rows * columns * inner, timer.normal(columns, dtype=dtype)
        calls = 1 if quick else max(1, int(1e8 / flops))
        product = lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias)  # noqa: E731
        rates[flops] = flops / timer(product, calls)
    attention = [_attention(timer, tokens, dtype) for tokens in (TOKENS[:1] if quick else TOKENS)]
    of_attention = [rate for _, *both in attention for rate in both]
    peak = max([*rates.values(), *of_attention, peak or 0])
    return {
        "peak": peak,
        "products": [[flops, rate / peak] for flops, rate in rates.items()],
        "attention": [[tokens, ahead / peak, back / peak] for tokens, ahead, back in attention],
    }


def _attention(timer: _Timer, tokens: int, dtype: torch.dtype) -> tuple[int, float, float]:
    """Tokens, and FLOPs a second forward and backward, of heads as many as keep the time about the
    same."""
    heads = max(1, (4000 if has_cuda() else 200) * 50 // tokens)
    q, k, v = (
        timer.normal(1, heads, tokens, HEAD_WIDTH, dtype=dtype).requires_grad_() for _ in range(3)
    )

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    grad = torch.ones_like(q)
    with torch.no_grad():
        ahead = timer(forward)
    both = timer(lambda: torch.autograd.grad(forward(), (q, k, v), grad))
    flops = 4 * tokens**2 * heads * HEAD_WIDTH
    return tokens, flops / ahead, 2 * flops / max(both - ahead, ahead)


def _links(timer: _Timer, launch: Launch, quick: bool) -> dict[str, Any]:
    """Between the processes: all within a machine, or where they are on several, between those.
    Within a machine several are not told apart from it."""
    ranks, group = timer.groups.layout.world, timer.groups.world
    if ranks == 1:
        return {}
    small, large = timer.normal(1), timer.normal(1 << (16 if quick else 22))
    latency = timer(lambda: dist.all_reduce(small, group=group), calls=10) / 2
    size = large.numel() * large.element_size()
    seconds = timer(lambda: dist.all_reduce(large, group=group))
    bandwidth = 2 * ring_bytes(size, ranks) / seconds
    link = {"bandwidth": bandwidth, "reached": 1.0, "latency": latency / (ranks - 1).bit_length()}
    on_several = launch.local_size is not None and launch.local_size < ranks
    return {"inside": link, "between": link} if on_several else {"inside": link}


def _step_model() -> tuple[str, int]:
    """Name and pairs of the model whose step is measured."""
    return ("ViT-B-16", 128) if has_cuda() else ("ViT-S-32-alt", 8)


def _overhead(device: Device, groups: Groups, clock: Clock) -> float:
    """What kernels take in a measured step as a multiple of what they take by themselves."""
    name, pairs = _step_model()
    ranks = groups.layout.world
    config = config_from_dict(
        {
            "model": {"name": name},
            "batch": {"global": pairs * ranks, "micro": pairs},
            "precision": "bf16" if has_cuda() else "fp32",
            "train": {"steps": 1},
            "schedule": {"warmup": 0},
            "data": {"train": [{"shards": "none.tar"}]},
        }
    )
    architecture = load_architecture(name)
    plan = make_layout_plan(architecture.costs, ranks, config)
    measured = min(timed_steps(config, architecture, plan, groups, REPEATS, clock))
    found = predict_step(plan, architecture, config, device, nodes_of=ranks)
    return max(1.0, 1 + (measured - found.seconds) / found.compute)
