"""The fp32 values of tensors that are not trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def writing_rank(number: int, data_ranks: int) -> int:
    """The data rank that writes the `number`-th tensor of `TrainState.global_parameters` into a
    checkpoint: another for each, so that they share the writing."""
    return number % data_ranks


class FrozenWeights:
    """What checkpoints have of tensors that are frozen, where the model itself holds them rounded.

    A trained tensor has a master for this. A frozen one has its fp32 value in host memory, on one
    data rank, which is the one that writes it: training leaves every bit of it, in bf16 too.

    tensors: all of the rank, in the order of `TrainState.global_parameters`.
    """

    def __init__(self, tensors: Sequence[nn.Parameter], data_rank: int, data_ranks: int):
        self._is_written_here = {
            id(tensor): writing_rank(number, data_ranks) == data_rank
            for number, tensor in enumerate(tensors)
        }
        self._exact: dict[int, Tensor] = {}

    @torch.no_grad()
    def set(self, tensor: nn.Parameter, value: Tensor) -> None:
        """Set a frozen tensor. `value`: fp32, of its shape."""
        tensor.copy_(value)
        if tensor.dtype != torch.float32 and self._is_written_here[id(tensor)]:
            self._exact[id(tensor)] = value.detach().to("cpu", torch.float32, copy=True)

    def value(self, tensor: nn.Parameter) -> Tensor:
        """Its fp32 value, of its shape, on the data rank that writes it."""
        return self._exact.get(id(tensor), tensor.detach())
