"""Count held-out samples that cannot be used, and end the evaluation when there are too many."""

from __future__ import annotations

import logging

from torch.distributed import ProcessGroup

from parallel_clip.data.feeding.evaluation_data import EvaluationBatch
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.errors import InputError

log = logging.getLogger(__name__)

TOLERATED = 0.01
"""The largest fraction of bad samples; above it a figure would not be of the whole set."""


class BadSamples:
    """Counts the samples of this rank; `total` is of all ranks, once `check_limit` was called."""

    def __init__(self):
        self._reports: list[str] = []
        self._good = 0
        self.total = 0

    def add(self, batch: EvaluationBatch) -> None:
        self._good += len(batch.images)
        self._reports += [str(sample) for sample in batch.bad]

    def check_limit(self, group: ProcessGroup | None, need: str) -> None:
        """Set `total`. Called by all ranks of `group`; None: this process alone.

        need: what a good sample has, for the message.

        Raises:
            InputError: more than `TOLERATED` are bad, or there is no good sample; on every rank.
        """
        first = next(iter(self._reports), None)
        parts = gather_objects((self._good, len(self._reports), first), group)
        goods, bads, firsts = zip(*parts, strict=True)
        good, self.total = sum(goods), sum(bads)
        first = next(filter(None, firsts), None)
        if self.total > TOLERATED * (good + self.total):
            raise InputError(
                f"{self.total:,} of {good + self.total:,} held-out samples cannot be used: {first}"
                f"{' (the first of them)' if self.total > 1 else ''}; {need}; correct the shards, "
                "or name others"
            )
        if not good:
            raise InputError("the held-out shards hold no samples; name others")
        if first is not None:
            log.warning("left out %d of %d samples; the first: %s", self.total, good, first)
