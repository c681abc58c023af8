"""Initial weights: a function of the seed and a parameter's global name, never of the rank.

Every parameter is drawn in full on the CPU by a generator of its own and then cut by its placement.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from parallel_clip.model.parameters import Normal, Parameter, TruncatedNormal, Uniform


def initial_value(parameter: Parameter, seed: int) -> Tensor:
    """The full initial tensor of a parameter: fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}:{parameter.name}".encode()).digest()
    own_seed = int.from_bytes(digest[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(own_seed)
    value, initial = torch.empty(parameter.shape), parameter.initial
    if isinstance(initial, Normal):
        return value.normal_(0, initial.std, generator=generator)
    if isinstance(initial, TruncatedNormal):
        bound = 2 * initial.std
        return nn.init.trunc_normal_(value, 0, initial.std, -bound, bound, generator=generator)
    if isinstance(initial, Uniform):
        return value.uniform_(-initial.bound, initial.bound, generator=generator)
    return value.fill_(initial.value)
