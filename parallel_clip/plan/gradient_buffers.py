"""How megatron-core lays weights and gradients into the buffers of data parallelism, by arithmetic.

A rank's tensors of one dtype lie in one buffer, cut into buckets, in the order in which backward
reaches them. Where optimizer state is split over the data ranks (ZeRO-1), each tensor begins at a
multiple of 64 numbers and each bucket ends where every data rank gets an equal share. The rules are
those of megatron-core 0.16 to 0.19, `core/distributed/param_and_grad_buffer.py` and
`core/optimizer/param_layout.py`. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

_TENSOR_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class BufferSize:
    """numbers: in the whole buffer, padding included; owned: of each tensor, those that the first
    data rank updates."""

    numbers: int
    owned: tuple[int, ...]


def buffer_size(
    sizes: Sequence[int], data_ranks: int, splits_state: bool, first_stage: bool
) -> BufferSize:
    """Of tensors of `sizes` numbers, in the order of the model. first_stage: of the pipeline, the
    only one whose buffer is cut into several buckets."""
    if not splits_state:
        return BufferSize(sum(sizes), tuple(sizes))
    least = max(40_000_000, 1_000_000 * data_ranks) if first_stage else None
    unit = lcm(data_ranks, _BUCKET_ALIGNMENT)
    owned, bucket, begin, end = [0] * len(sizes), [], 0, 0

    def close() -> int:
        whole = _padded(end - begin, unit)
        share = begin + whole // data_ranks
        for number, start, stop in bucket:
            owned[number] = max(0, min(stop, share) - start)
        bucket.clear()
        return begin + whole

    for number in reversed(range(len(sizes))):
        start = _padded(end, _TENSOR_ALIGNMENT)
        end = start + sizes[number]
        bucket.append((number, start, end))
        if least is not None and end - begin >= least:
            begin = end = close()
    if bucket:
        end = close()
    return BufferSize(end, tuple(owned))


def _padded(number: int, unit: int) -> int:
    return -(-number // unit) * unit
