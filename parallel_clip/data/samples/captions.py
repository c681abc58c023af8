"""The captions of a sample: which text is one, and which of several are trained with."""

import json
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import Any

from parallel_clip.data.samples.decode import bad_sample, bytes_of, text_of
from parallel_clip.data.storage.shards import StoredSample

MAX_JSON_BYTES = 2**20
MAX_CAPTION_BYTES = 64 * 2**10

RandomBits = Callable[[str], int]  # of a sample: 64 random bits for each purpose


@dataclass(frozen=True)
class CaptionRule:
    """Where a sample's captions are and what is one. The defaults are those of evaluation.

    key: None for `.txt`; a key of `.json`; or several keys, each with its weight: `draw` takes a
    caption from one of them, with a probability that is its part of the weights.
    lines: every line of `.txt` is a caption; else the whole text is one, as in OpenCLIP.
    keep_empty: a caption that is empty, or at one of several keys missing, is an empty text. Else
    it is none, and a sample without any is bad.
    """

    key: str | Mapping[str, float] | None = None
    lines: bool = True
    keep_empty: bool = False

    def captions_of(self, sample: StoredSample) -> list[str]:
        """All captions, at least one; of several keys those of the most probable that has any (of
        equal ones the first). Raises BadSampleError."""
        captions = self._captions_by_key(sample)
        return captions[max(captions, key=self._weights.__getitem__)]

    def first(self, sample: StoredSample, count: int) -> list[str]:
        """The first `count` captions, of the most probable key, then of the next one, and so on;
        from the beginning again where there are fewer. Raises BadSampleError."""
        captions = self._captions_by_key(sample)
        keys = sorted(captions, key=self._weights.__getitem__, reverse=True)  # stable
        return list(islice(cycle(chain.from_iterable(map(captions.get, keys))), count))

    def draw(self, sample: StoredSample, bits: RandomBits, count: int) -> list[str]:
        """`count` captions: each time, of a key that is drawn among those that have any left, one
        of its captions left. Once none is left all are there again. Raises BadSampleError."""
        captions, left, drawn = self._captions_by_key(sample), {}, []
        for number in range(count):
            # By name: the order in which a config lists its keys changes nothing.
            left = left or {key: list(captions[key]) for key in sorted(captions)}
            purpose = f" {number}" if number else ""
            ends = list(accumulate(self._weights[key] for key in left))
            place = bits(f"caption_key{purpose}") / 2**64 * ends[-1]
            key = list(left)[bisect(ends, place, hi=len(left) - 1)]
            drawn.append(left[key].pop(bits(f"caption{purpose}") % len(left[key])))
            if not left[key]:
                del left[key]
        return drawn

    def count(self, sample: StoredSample) -> int:
        """How many captions the sample has, of all keys. Raises BadSampleError."""
        return sum(map(len, self._captions_by_key(sample).values()))

    @property
    def _weights(self) -> Mapping[str, float]:
        return (
            self.key
            if isinstance(self.key, Mapping)
            else {"txt" if self.key is None else self.key: 1.0}
        )

    def _captions_by_key(self, sample: StoredSample) -> dict[str, list[str]]:
        """Of each key that has captions, all of them; at least one key."""
        if self.key is None:
            text = text_of(sample, "txt", MAX_CAPTION_BYTES)
            lines = [line.removesuffix("\r") for line in text.split("\n")]
            found = {"txt": lines if self.lines else [text]}
        else:
            record = json_of(sample)
            several = len(self._weights) > 1
            # All are looked at, whichever is drawn: whether a sample is bad depends on it alone.
            found = {key: _captions_at(sample, record, key, several) for key in self._weights}
        used = {key: self._without_empty(captions) for key, captions in found.items()}
        used = {key: captions for key, captions in used.items() if captions}
        if not used and len(found) > 1:
            names = ", ".join(map(repr, found))
            raise bad_sample(sample, f".json has a caption at none of {names}")
        if not used:
            raise bad_sample(sample, "the caption is empty")
        return used

    def _without_empty(self, captions: list[str]) -> list[str]:
        used = [caption for caption in captions if caption.strip()]
        return used or (captions[:1] or [""] if self.keep_empty else [])


def json_of(sample: StoredSample) -> Any:
    """What the sample's `.json` holds. Raises BadSampleError."""
    data = bytes_of(sample, "json", MAX_JSON_BYTES)
    try:
        return json.loads(data)  # bytes: UTF-8, UTF-16 or UTF-32, also with a byte-order mark
    except (ValueError, RecursionError) as error:
        raise bad_sample(sample, f".json cannot be read: {error}") from None


def _captions_at(sample: StoredSample, record: Any, key: str, may_lack: bool) -> list[str]:
    value = record.get(key) if isinstance(record, dict) else None
    if value is None and may_lack:
        return []
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise bad_sample(sample, f".json has no text, or list of texts, at {key!r}")
    try:
        longest = max((len(caption.encode()) for caption in captions), default=0)
    except UnicodeEncodeError:
        raise bad_sample(
            sample, "a caption with half of a surrogate pair, which is no text"
        ) from None
    if longest > MAX_CAPTION_BYTES:
        raise bad_sample(sample, f"a caption of {longest:,} bytes, at most {MAX_CAPTION_BYTES:,}")
    return captions
