"""Small pieces of code, each with what Watch is to count of it.

A watch that sees nothing would find every step faultless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.layout import Layout
from tests.fake_cuda.watch import Watch

# Of a fp32 [2, 3] on the device: reads, copies, waits, kernels.
PROBES: dict[str, tuple[Callable[[Tensor], object], tuple[int, int, int, int]]] = {
    "item": (lambda x: x[0, 0].item(), (1, 0, 0, 0)),
    "float": (lambda x: float(x[0, 0]), (1, 0, 0, 0)),
    "bool": (lambda x: bool(x[0, 0]), (1, 0, 0, 0)),
    "tolist": (lambda x: x.tolist(), (1, 0, 0, 0)),
    "cpu": (lambda x: x.cpu(), (1, 1, 0, 0)),
    "nonzero": (lambda x: x.nonzero(), (1, 0, 0, 0)),
    "list of tensors": (lambda x: torch.tensor([x[0, 0], x[1, 1]]), (2, 0, 0, 0)),
    "tensor of numbers": (lambda x: torch.tensor([1.0, 2.0], device="cuda"), (0, 1, 0, 0)),
    "to device": (lambda x: torch.ones(3).to("cuda"), (0, 1, 0, 1)),
    "copy_": (lambda x: x.copy_(torch.ones(2, 3)), (0, 1, 0, 1)),
    "index on the host": (lambda x: x[torch.tensor([1])], (0, 1, 0, 1)),
    "synchronize": (lambda x: torch.cuda.synchronize(), (0, 0, 1, 0)),
    "view": (lambda x: x.view(6)[1:].detach(), (0, 0, 0, 0)),
    "arithmetic": (lambda x: (x + 1) @ x.t(), (0, 0, 0, 2)),
}


def unexpected() -> Iterator[str]:
    """What is not counted as it should be."""
    with fake_rank(Layout(1)):
        for name, (probe, expected) in PROBES.items():
            watch = Watch()
            x = torch.ones(2, 3, device="cuda")
            with watch:
                probe(x)
            step = watch.step
            found = tuple(
                sum(counter.values())
                for counter in (step.reads, step.copies, step.waits, step.kernels)
            )
            if found != expected:
                yield f"{name}: {found}, expected {expected}"
