"""What makes two captions of a batch duplicates for the loss: their tokens, or a sample's value.

An identity is a 64-bit hash, the same on every rank and in every layout. That any two of 32,768
different pairs have equal ones has a probability of 3e-11.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from parallel_clip.data.order.sample_order import SampleAddress
from parallel_clip.data.samples.captions import json_of
from parallel_clip.data.storage.shards import BadSampleError, StoredSample


@dataclass(frozen=True)
class IdentityRule:
    """key: the identity is that of the value at this key of the sample's `.json`; None: that of the
    tokens of the caption which it is trained with."""

    key: str | None = None

    @classmethod
    def of(cls, duplicates: str) -> IdentityRule | None:
        """By `loss.duplicates`: none, tokens or key:NAME."""
        if duplicates == "none":
            return None
        return cls(None if duplicates == "tokens" else duplicates.removeprefix("key:"))

    def value_of(self, sample: StoredSample) -> Any:
        """What the sample has at `key`; None where it has nothing: no `.json` or none that can be
        read, no such key, null, NaN or an empty text."""
        try:
            record = json_of(sample)
        except BadSampleError:
            return None
        value = record.get(self.key) if isinstance(record, dict) else None
        return None if value == "" or value != value else value

    def of_sample(self, sample: StoredSample, address: SampleAddress) -> int:
        """Where `key` is given: equal for equal JSON values, so 1 and "1" differ. A sample without
        a value is a duplicate of itself alone, by its address."""
        value = self.value_of(sample)
        if value is None:
            return _hash(f"\0{address.source} {address.shard} {address.index}".encode())
        return _hash(json.dumps(value, sort_keys=True).encode())


def identities_of_tokens(tokens: Tensor) -> Tensor:
    """Of each row of token ids, int64 [b, L] on the CPU: int64 [b]."""
    return torch.tensor([_hash(row.tobytes()) for row in tokens.numpy()], dtype=torch.int64)


def _hash(content: bytes) -> int:
    return int.from_bytes(xxhash.xxh3_64_digest(content), "big", signed=True)
