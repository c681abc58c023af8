"""A machine's cache of pages, filled in the order of a run. No file is read."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from parallel_clip.data.order.sample_order import Order

SAMPLE_BYTES = 50_000


def fetched_of_read(
    order: Order, machines: int, machine: int, *, shard: int, page: int, cache: int
) -> float:
    """Bytes of pages fetched beside bytes of samples read, over an epoch that begins in the middle
    of one, when the cache has filled.

    shard: samples of each; page, cache: bytes, of one and of all that are kept.
    """
    samples, batch = order.samples_per_epoch, order.batch
    pages_of_shard = -(-shard * SAMPLE_BYTES // page)
    held: OrderedDict[int, None] = OrderedDict()
    fetched = read = 0
    for step in range(3 * samples // (2 * batch)):
        if step == samples // (2 * batch):
            fetched = read = 0
        first, stop = (step * batch + part * batch // machines for part in (machine, machine + 1))
        found = order.of_positions(np.arange(first, stop))
        begins = found.index * SAMPLE_BYTES
        base = found.shard * pages_of_shard
        ends = base + (begins + SAMPLE_BYTES - 1) // page
        read += stop - first
        for begin, end in zip((base + begins // page).tolist(), ends.tolist(), strict=True):
            for wanted in (begin,) if begin == end else (begin, end):
                if wanted in held:
                    held.move_to_end(wanted)
                    continue
                fetched += 1
                held[wanted] = None
                if len(held) > cache // page:
                    held.popitem(last=False)
    return fetched * page / (read * SAMPLE_BYTES)
