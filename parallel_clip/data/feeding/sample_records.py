"""Where samples were read, and which could not be used: plain values that logs and ledgers keep."""

from typing import NamedTuple


class StoredAddress(NamedTuple):
    """Where a sample lies: number of its source, path of its shard, key therein."""

    source: int
    shard: str
    key: str


class BadSample(NamedTuple):
    """A sample that could not be used at a position of the order, and why."""

    position: int
    source: int
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.key} of {self.shard} (position {self.position}): {self.reason}"
