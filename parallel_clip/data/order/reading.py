"""How many bytes a machine reads in an epoch, and has in use at a time: arithmetic on the order."""

from __future__ import annotations

from typing import NamedTuple

from parallel_clip.data.order.sample_order import SHUFFLE_BLOCK, SHUFFLED


class MachineReading(NamedTuple):
    """What the fullest of a job's machines reads, in bytes.

    own: the samples that it trains on in an epoch; fetched: the pages that it fetches for them, if
    it keeps those `in_use` until all their samples have been read.
    """

    own: float
    fetched: float
    in_use: float


def machine_reading(
    pairs: int, streams: int, sample_bytes: float, machines: int, page: int
) -> MachineReading:
    """The reading of each of `machines`, each of which takes the same part of every batch.

    pairs: in an epoch; streams: of the order; sample_bytes: of a sample, on average; page: bytes
    that are fetched at a time, 1 where parts of files are read as they are wanted.

    A stretch of `SHUFFLE_BLOCK` neighbours of a shard begins and ends within a page, so one page
    more than its bytes fill is fetched. A stream that two machines share is fetched by both, but
    for pages of which one of them needs no sample.
    """
    edges = 1 + page / (SHUFFLE_BLOCK * sample_bytes)
    samples_of_page = max(1.0, page / sample_bytes)
    fullest = 0.0
    for machine in range(machines):
        first, stop = machine * streams / machines, (machine + 1) * streams / machines
        touched = 0.0
        for stream in range(int(first), min(streams, int(stop) + 1)):
            part = min(stop, stream + 1) - max(first, stream)
            touched += 1 - (1 - min(1.0, max(0.0, part))) ** samples_of_page
        fullest = max(fullest, touched)
    per_stream, all_bytes = pairs / streams, pairs * sample_bytes
    return MachineReading(
        all_bytes / machines,
        min(all_bytes, fullest * per_stream * sample_bytes * edges),
        min(all_bytes, fullest * min(per_stream, SHUFFLED / streams) * sample_bytes * edges),
    )
