"""What a step does beside its arithmetic, exactly: never to be loosened.

A test that fails shows what was counted, and the callers; renew a number here only with a reason
for it.
"""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Of the second step, as in `watch.Counts`."""

    reads: int = 0
    copies: int = 0
    waits: int = 0
    uploads: int = 0


# One read, between the gradient norm and the update (training/exchange.py), in every layout; one
# more where the loss asks whether a batch has duplicates (loss/duplicates.py).
STEP = Counted(reads=1)
STEP_WITH_DUPLICATES = Counted(reads=2)

# Of a feed that reads: tokens and pictures of two microbatches, the pictures again in a second
# pass. The patches to keep come from page-locked memory, too, which the fake world, in which it is
# made, does not know as such.
FEED: dict[str, Counted] = {
    "fed-fp32": Counted(uploads=6),
    "fed-bf16": Counted(uploads=6),
    "fed-patch-dropout": Counted(copies=4, uploads=6),
    "fed-tensor-pipeline-reader": Counted(uploads=4),
    "fed-captions": Counted(uploads=6),
    # Identities of two microbatches, too.
    "fed-duplicates": Counted(uploads=8),
}

# Kernels of one layer of the picture tower for one microbatch: in forward, in backward and in the
# optimizer. `pytest tests/fake_cuda -k kernels -s` prints them. megatron-core 0.16 and 0.19 agree;
# a version that does not gets a table of its own.
Kernels = tuple[int, int, int]

_SINCE_0_16: dict[str, Kernels] = {
    "fp32": (12, 33, 0),
    "bf16": (14, 37, 12),
    "recompute-full": (14, 51, 12),
    "data": (14, 37, 7),
    "tensor-sequence": (19, 38, 18),
}
KERNELS = {"0.16": _SINCE_0_16, "0.19": _SINCE_0_16}
