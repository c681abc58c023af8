"""A step's inputs on the device: all tokens, and pictures as the schedule asks for them. No torch.

b pairs in a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Pictures(NamedTuple):
    """A microbatch's images [b, 3, height, width], fp32 or in the model's dtype, and the patches to
    keep, int64 [b, k], or None for all."""

    images: Tensor
    kept: Tensor | None = None


class StepInputs:
    """The microbatches of one step.

    tokens: int64 [b, context] of each microbatch, on every stage.
    fetch: puts the pictures of a microbatch on the device. It is called on the first stage alone,
        in the order of the schedule, which is the same on all tensor ranks: it may broadcast.
    """

    def __init__(self, tokens: Sequence[Tensor], fetch: Callable[[int], Pictures]):
        self.tokens = tokens
        self._fetch = fetch
        self._ahead: dict[int, Pictures] = {}

    def pictures(self, number: int, following: int | None) -> Pictures:
        """The pictures of microbatch `number`, no longer held here. Fetches those of `following`,
        the microbatch asked for next; None: no other in this pass."""
        current = self._ahead.pop(number, None) or self._fetch(number)
        self._ahead = {} if following is None else {following: self._fetch(following)}
        return current
