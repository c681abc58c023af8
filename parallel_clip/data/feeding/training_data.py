"""The training pairs at positions of the order: read, decoded, augmented; bad ones replaced.

The pair at a position is a function of the shards, the seed and the position alone.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from parallel_clip.data.feeding.sample_records import BadSample, StoredAddress
from parallel_clip.data.feeding.workers import report_progress
from parallel_clip.data.index.shard_table import ShardTable
from parallel_clip.data.order.run_order import RunOrder
from parallel_clip.data.order.sample_order import SampleAddress
from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import PictureRule, decode_picture, pillows_limit
from parallel_clip.data.samples.identities import IdentityRule, identities_of_tokens
from parallel_clip.data.samples.tokenizer import Tokenizer
from parallel_clip.data.samples.transforms import Transform, sample_seed, seeded
from parallel_clip.data.storage.addresses import without_signature
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles
from parallel_clip.errors import BadDataError

MAX_SUBSTITUTES = 64  # samples tried in place of a bad one
RECENT_SHARDS = 1024  # whose index a worker keeps in memory: 80 KB each at 10,000 samples


@dataclass(frozen=True)
class Microbatch:
    """b pairs on the CPU. `addresses` has the sample that was read at each position: its own, or
    the substitute where `bad` lists its own."""

    images: Tensor  # [b, 3, H, W], as the transform gives them: fp32, or uint8 to be normalized
    tokens: Tensor  # int64 [b, L]
    positions: Tensor  # int64 [b]
    addresses: list[StoredAddress]
    bad: list[BadSample]
    identities: Tensor | None = None  # int64 [b], equal where pairs are duplicates; None: not asked

    def pin_memory(self) -> "Microbatch":
        """The same in page-locked memory, from where copies to a GPU can overlap with its work."""
        return replace(
            self,
            images=self.images.pin_memory(),
            tokens=self.tokens.pin_memory(),
            positions=self.positions.pin_memory(),
            identities=None if self.identities is None else self.identities.pin_memory(),
        )


@dataclass
class TrainingData:
    """All training pairs, by ranges of positions: `data[range(0, 8)]` is a Microbatch of 8.

    captions: of each source; any_caption: draw one of several captions, else take the first;
    identity: what the identities of pairs are; None: they have none.
    """

    sources: Sequence[ShardTable]
    order: RunOrder
    transform: Transform
    tokenizer: Tokenizer
    _: KW_ONLY
    any_caption: bool
    captions: Sequence[CaptionRule]
    pictures: PictureRule
    identity: IdentityRule | None = None

    def __post_init__(self) -> None:
        self._files = ShardFiles()
        sources = self.sources
        self._shard = lru_cache(RECENT_SHARDS)(lambda source, shard: sources[source][shard])

    def __getitem__(self, positions: range) -> Microbatch:
        """Read the pairs at `positions`; BadDataError where no substitute of a bad one is good."""
        found = self.order.of_positions(np.arange(positions.start, positions.stop))
        addresses = [SampleAddress(*map(int, address)) for address in zip(*found, strict=True)]
        pairs = map(self._pair, positions, addresses)
        images, captions, stored, bad, identities = zip(*pairs, strict=True)
        tokens = self.tokenizer(captions)
        return Microbatch(
            default_collate(images),  # in a worker straight into the memory that it shares
            tokens,
            torch.tensor(positions),
            list(stored),
            [sample for sample in bad if sample is not None],
            self._identities(tokens, identities),
        )

    def _identities(self, tokens: Tensor, of_samples: Sequence[int | None]) -> Tensor | None:
        if self.identity is None:
            return None
        if self.identity.key is None:
            return identities_of_tokens(tokens)
        return torch.tensor(of_samples, dtype=torch.int64)

    def describe_position(self, source: int, shard: int, index: int) -> str:
        return f"sample {index} of {self.sources[source].paths[shard]}"

    def _pair(
        self, position: int, address: SampleAddress
    ) -> tuple[Tensor, str, StoredAddress, BadSample | None, int | None]:
        """Picture, caption, where they are from, the bad sample that they stand in for, and the
        identity where it is a value of the sample."""
        bad = None
        bits = partial(sample_seed, self.order.seed, position)
        for attempt in range(MAX_SUBSTITUTES + 1):
            if attempt:
                address = self.order.substitute(position, attempt)
            report_progress(address.source, address.shard, address.index)
            shard = self._shard(address.source, address.shard)
            try:
                sample = self._files.read(shard, address.index)
                rule = self.captions[address.source]
                if self.any_caption:
                    caption = rule.draw(sample, bits)
                else:
                    caption = rule.captions_of(sample)[0]
                picture = decode_picture(sample, self.pictures)
            except BadSampleError as error:
                bad = bad or BadSample(
                    position,
                    address.source,
                    without_signature(shard.path),
                    error.key,
                    error.reason,
                )
                continue
            # A crop of a large picture is a picture of which Pillow looks at the size again.
            with seeded(bits("augment")), pillows_limit(self.pictures.max_pixels):
                image = self.transform(picture)
            stored = StoredAddress(address.source, without_signature(shard.path), sample.key)
            identity = None
            if self.identity is not None and self.identity.key is not None:
                identity = self.identity.of_sample(sample, address)
            return image, caption, stored, bad, identity
        raise BadDataError(
            f"{bad}; the {MAX_SUBSTITUTES} samples tried in its place are bad too; "
            "parallel-clip data check names all that are"
        )
