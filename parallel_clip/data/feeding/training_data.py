"""The training pairs at positions of the order: read, decoded, augmented; bad ones replaced.

The pair at a position is a function of the shards, the seed and the position alone.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache, partial
from itertools import chain

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
    """b pairs on the CPU, each a picture with its k captions. `addresses` has the sample that was
    read at each position: its own, or the substitute where `bad` lists its own."""

    images: Tensor  # [b, 3, H, W], as the transform gives them: fp32, or uint8 to be normalized
    tokens: Tensor  # int64 [b·k, L], row i·k + j of caption j of picture i
    positions: Tensor  # int64 [b]
    addresses: list[StoredAddress]
    bad: list[BadSample]
    # int64 [b·k], of captions, equal where they are duplicates; None: not asked
    identities: Tensor | None = None

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

    captions: of each source; any_caption: draw among several captions, else take the first;
    captions_per_image: how many; identity: what the identities of captions are; None: they have
    none.
    """

    sources: Sequence[ShardTable]
    order: RunOrder
    transform: Transform
    tokenizer: Tokenizer
    _: KW_ONLY
    any_caption: bool
    captions: Sequence[CaptionRule]
    pictures: PictureRule
    captions_per_image: int = 1
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
        tokens = self.tokenizer([*chain.from_iterable(captions)])
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
        identities = torch.tensor(of_samples, dtype=torch.int64)
        return identities.repeat_interleave(self.captions_per_image)

    def describe_position(self, source: int, shard: int, index: int) -> str:
        return f"sample {index} of {self.sources[source].paths[shard]}"

    def _pair(
        self, position: int, address: SampleAddress
    ) -> tuple[Tensor, list[str], StoredAddress, BadSample | None, int | None]:
        """Picture, captions, where they are from, the bad sample that they stand in for, and the
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
                rule, count = self.captions[address.source], self.captions_per_image
                if self.any_caption:
                    captions = rule.draw(sample, bits, count)
                else:
                    captions = rule.first(sample, count)
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
            return image, captions, stored, bad, identity
        raise BadDataError(
            f"{bad}; the {MAX_SUBSTITUTES} samples tried in its place are bad too; "
            "parallel-clip data check names all that are"
        )
