"""A step's inputs on the device: all tokens, and pictures as the schedule asks for them. No torch.

b pictures in a microbatch, each with k texts, those of a picture in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Pictures(NamedTuple):
    """A microbatch's images [b, 3, height, width], fp32 or in the model's dtype, and the patches to
    keep, int64 [b, patches], or None for all."""

    images: Tensor
    kept: Tensor | None = None


class StepInputs:
    """The microbatches of one step.

    tokens: int64 [b·k, context] of each microbatch, on every stage.
    identities: int64 [m·b·k] of all m microbatches, on every stage: equal where texts are
        duplicates for the loss; None: it looks at none.
    fetch: gives the pictures of a microbatch on the device. It is called on the first stage alone,
        in the order of the schedule, which is the same on all tensor ranks: it may broadcast.
    prepare: called with the number of the microbatch that is fetched next, before the current one
        runs, so that its copy to the device can begin.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        fetch: Callable[[int], Pictures],
        prepare: Callable[[int], None] = lambda number: None,
        identities: Tensor | None = None,
    ):
        self.tokens = tokens
        self.identities = identities
        self._fetch = fetch
        self._prepare = prepare

    def pictures(self, number: int, following: int | None) -> Pictures:
        """The pictures of microbatch `number`, not held here. following: the microbatch asked for
        next; None: no other in this pass."""
        current = self._fetch(number)
        if following is not None:
            self._prepare(following)
        return current
