"""What every rank tells every other in a step: one collective, and one read of the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def tell_all(
    on_device: Tensor | None,
    known: Sequence[float],
    device: torch.device,
    world: ProcessGroup | None,
) -> np.ndarray:
    """The numbers of every rank, fp64 [ranks, n], in the order of ranks; the same on all of them.

    on_device: [k], numbers that the host does not know yet; known: others that it does, behind
    them. They go to the device as arguments of kernels: a copy would wait for what runs there.
    """
    parts = [torch.full((1,), number, dtype=torch.float64, device=device) for number in known]
    if on_device is not None:
        parts.insert(0, on_device.double())
    own = torch.cat(parts)
    if world is None:
        return np.array([own.tolist()])
    everyones = own.new_empty(world.size() * len(own))
    dist.all_gather_into_tensor(everyones, own, group=world)
    return np.array(everyones.view(world.size(), -1).tolist())
