"""What the steps of today do, exactly: to be tightened by whoever mends them, never loosened.

A test that fails shows what was counted, and the callers; renew a number here only with a reason
for it. The goal: one read a step, and no copy or wait.

Reads of today: one for each tensor that this rank adds to the gradient norm (megatron-core without
Transformer Engine or Apex), and five: the norm, whether gradients are finite, the logit parameters,
the loss, the complaint. One more where data ranks compare shapes in the loss, and where the loss is
on all stages.
Copies: the norm and the complaint, put on the device; likewise one more with data ranks, and for
the multiplier on stages that help with the loss.
Waits: megatron-core's schedule waits for the device after each exchange with other stages, but for
virtual stages, which do not batch theirs.
Feed: bf16 pictures are converted on the host and lose their page-locked memory; patch dropout reads
positions back, and copies the patches to keep.
"""

from __future__ import annotations

from typing import NamedTuple


class Counted(NamedTuple):
    """Of the second step, as in `watch.Counts`."""

    reads: int = 0
    copies: int = 0
    waits: int = 0
    uploads: int = 0


EXPECTED: dict[str, dict[str, Counted]] = {
    "fp32": {"step": Counted(67, 2, 0)},
    "bf16": {"step": Counted(67, 2, 0)},
    "recompute-selective": {"step": Counted(67, 2, 0)},
    "recompute-full": {"step": Counted(67, 2, 0)},
    "two-pass": {"step": Counted(67, 2, 0)},
    "stash": {"step": Counted(67, 2, 0)},
    "sigmoid": {"step": Counted(68, 2, 0)},
    "patch-dropout": {"step": Counted(67, 2, 0)},
    "data": {"step": Counted(30, 3, 0)},
    "data-fp32": {"step": Counted(30, 3, 0)},
    "data-whole-optimizer": {"step": Counted(68, 3, 0)},
    "data-sigmoid-ring": {"step": Counted(31, 3, 0)},
    "data-infonce-streamed": {"step": Counted(30, 3, 0)},
    "tensor": {"step": Counted(30, 2, 0)},
    "tensor-sequence": {"step": Counted(30, 2, 0)},
    "tensor-sequence-full": {"step": Counted(30, 2, 0)},
    "pipeline-first": {"step": Counted(36, 2, 5)},
    "pipeline-last": {"step": Counted(36, 2, 5)},
    "pipeline-last-two-pass": {"step": Counted(36, 2, 9)},
    "virtual-first": {"step": Counted(36, 2, 0)},
    "virtual-last": {"step": Counted(36, 2, 0)},
    "loss-on-all-first": {"step": Counted(37, 3, 5)},
    "loss-on-all-last": {"step": Counted(37, 2, 5)},
    "all-first": {"step": Counted(23, 2, 5)},
    "all-last": {"step": Counted(12, 3, 5)},
    "fed-fp32": {"step": Counted(67, 2, 0), "feed": Counted(uploads=10)},
    "fed-bf16": {"step": Counted(67, 2, 0), "feed": Counted(copies=4, uploads=6)},
    "fed-patch-dropout": {"step": Counted(67, 2, 0), "feed": Counted(4, 8, 0, 6)},
    "fed-tensor-pipeline-reader": {"step": Counted(36, 2, 5), "feed": Counted(copies=2, uploads=4)},
    "fed-tensor-pipeline-other": {"step": Counted(17, 2, 5)},
}

# Kernels of one layer of the picture tower for one microbatch: in forward, in backward and in the
# optimizer. `pytest tests/fake_cuda -k kernels -s` prints them. megatron-core 0.16 and 0.19 agree;
# a version that does not gets a table of its own.
Kernels = tuple[int, int, int]

_SINCE_0_16: dict[str, Kernels] = {
    "fp32": (12, 33, 12),
    "bf16": (14, 37, 24),
    "recompute-selective": (14, 40, 24),
    "recompute-full": (14, 51, 24),
    "two-pass": (28, 37, 24),
    "data": (14, 37, 14),
    "data-whole-optimizer": (14, 37, 24),
    "tensor": (18, 37, 18),
    "tensor-sequence": (19, 38, 24),
    "tensor-sequence-full": (19, 57, 24),
}
KERNELS = {"0.16": _SINCE_0_16, "0.19": _SINCE_0_16}
