"""An exponential moving average of the weights, kept beside the fp32 masters and split as they
are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parallel_clip.optimizer.adamw import MegatronAdamW


class WeightAverage:
    """After each `every`-th update of the optimizer

        average = decay · average + (1 - decay) · master

    element by element, in fp32, of what this data rank owns of each tensor that is trained. It is
    zeros until `start` or `set` gives it values. decay: between 0 and 1.
    """

    def __init__(
        self, optimizer: MegatronAdamW, tensors: Iterable[nn.Parameter], decay: float, every: int
    ):
        self.decay = decay
        self.every = every
        self._optimizer = optimizer
        owned = {tensor: optimizer.owned_state(tensor) for tensor in tensors}
        self._owned = {tensor: part for tensor, part in owned.items() if part is not None}
        self._masters = [part.master for part in self._owned.values()]
        self._averages = [torch.zeros_like(master) for master in self._masters]
        self._by_tensor = dict(zip(self._owned, self._averages, strict=True))

    def of(self, tensor: nn.Parameter) -> Tensor | None:
        """The average of what this data rank owns of `tensor`, fp32, flattened as its master; None
        where it owns nothing."""
        return self._by_tensor.get(tensor)

    @torch.no_grad()
    def start(self) -> None:
        """Begin from the masters as they are."""
        for average, master in zip(self._averages, self._masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def set(self, tensor: nn.Parameter, value: Tensor) -> None:
        """Set the average of `tensor`. `value`: fp32, of the tensor's shape."""
        owned = self._owned.get(tensor)
        if owned is not None:
            self._by_tensor[tensor].copy_(value.reshape(-1)[owned.start : owned.stop])

    @torch.no_grad()
    def after_update(self, updates: int) -> None:
        """To be called after each update of the optimizer, the `updates`-th of the run, once the
        weights are what a checkpoint of them would have (the logit scale is in its range)."""
        if updates % self.every == 0 and self._averages:  # none where all here is frozen
            # On a GPU one kernel takes many tensors.
            torch._foreach_lerp_(self._averages, self._masters, 1 - self.decay)

    @torch.no_grad()
    def exchange_with_weights(self) -> None:
        """Put the average in the place of the weights, model and masters, and these in its place; a
        second call restores the bits of all. Called by all data ranks."""
        for average, master in zip(self._averages, self._masters, strict=True):
            weight = master.clone()
            master.copy_(average)
            average.copy_(weight)
        self._optimizer.copy_masters_to_weights()
