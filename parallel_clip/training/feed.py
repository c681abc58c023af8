"""From the loader to the device: one rank of each copy of the model reads, and broadcasts it.

Tokens go to all ranks of all stages when a step begins, as texts are pooled where the end-of-text
token is, and so do the identities of texts, as any stage may work on the loss. Pictures go to the
tensor ranks of the first stage, in each pass anew: their copy to the device begins one microbatch
ahead of the schedule, as bytes, which are normalized there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.training_data import BadSample, Microbatch
from parallel_clip.data.samples.transforms import Preprocess, normalize
from parallel_clip.engine.device import CopyStream
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import BatchPlan
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch
from parallel_clip.pipeline.inputs import Pictures, StepInputs


@dataclass(frozen=True)
class StepBatch:
    """A data rank's share of one global batch. `read`, `bad` and the counts are those of the rank
    that reads (`Groups.reads_data`), and empty on the others that share the model with it."""

    inputs: StepInputs
    read: Sequence[Microbatch]

    @property
    def bad(self) -> list[BadSample]:
        return [sample for microbatch in self.read for sample in microbatch.bad]

    def of_sources(self, sources: int) -> list[int]:
        """The number of pairs read from each source."""
        read = [address.source for microbatch in self.read for address in microbatch.addresses]
        return np.bincount(np.array(read, np.int64), minlength=sources).tolist()


@dataclass
class DeviceFeed:
    """Broadcasts the loader's microbatches to the ranks that share a copy of the model.

    loader: given where `groups.reads_data`, None on the others; dtype: of the pictures; preprocess:
    by which pictures that come as uint8 are normalized here; None: they are already; identities:
    whether the loader's microbatches have some.
    """

    loader: TrainingLoader | None
    architecture: Architecture
    plan: BatchPlan
    groups: Groups
    dtype: torch.dtype
    seed: int
    preprocess: Preprocess | None = None
    identities: bool = False

    @property
    def normalizes(self) -> bool:
        return self.preprocess is not None

    def __post_init__(self) -> None:
        self._copies = CopyStream()
        self._slice = RankBatchSlice(
            self.plan.global_batch,
            self.plan.micro_batch,
            self.groups.data_rank,
            self.groups.layout.data,
        )

    def batches(self, first_step: int, steps: int) -> Iterator[StepBatch]:
        """The batch of each step from `first_step` (counted from 0) on."""
        source = iter(self.loader) if self.loader is not None else None
        for step in range(first_step, steps):
            read = next(source) if source is not None else []
            tokens = [
                self._share_tokens(read[number] if read else None)
                for number in range(self.plan.microbatches)
            ]
            ahead: dict[int, Tensor] = {}  # copies that have begun, by microbatch
            inputs = StepInputs(
                tokens,
                partial(self._share_pictures, step, read, ahead),
                partial(self._begin_copy, read, ahead),
                self._share_identities(read) if self.identities else None,
            )
            yield StepBatch(inputs, read)

    def _share_tokens(self, microbatch: Microbatch | None) -> Tensor:
        """A microbatch's tokens, on every rank that shares the model."""
        texts = self.plan.micro_batch * self.plan.captions
        context = self.architecture.text.context_length
        groups = self.groups
        if microbatch is None:
            tokens = torch.empty(texts, context, dtype=torch.int64, device=groups.device)
        else:
            tokens = microbatch.tokens
        return self._share_with_all_stages(tokens)

    def _share_identities(self, read: Sequence[Microbatch]) -> Tensor:
        """Of all texts of the step, on every rank that shares the model."""
        device = self.groups.device
        if read:  # joined there: what is joined here would be in ordinary memory
            parts = [part.identities.to(device, non_blocking=True) for part in read]
            identities = torch.cat(parts)
        else:
            texts = self.plan.per_rank * self.plan.captions
            identities = torch.empty(texts, dtype=torch.int64, device=device)
        return self._share_with_all_stages(identities)

    def _share_with_all_stages(self, tensor: Tensor) -> Tensor:
        if self.groups.pipeline_rank == 0:
            tensor = self._broadcast(tensor, self.groups.tensor)
        return self._broadcast(tensor, self.groups.pipeline)

    def _begin_copy(
        self, read: Sequence[Microbatch], ahead: dict[int, Tensor], number: int
    ) -> None:
        if read:
            ahead[number] = self._copies.begin(read[number].images, self.groups.device)

    def _share_pictures(
        self, step: int, read: Sequence[Microbatch], ahead: dict[int, Tensor], number: int
    ) -> Pictures:
        """A microbatch's pictures, on every tensor rank of the first stage."""
        if number not in ahead:
            self._begin_copy(read, ahead, number)
        if read:
            images = self._copies.finish(ahead.pop(number))
        else:
            pairs, size = self.plan.micro_batch, self.architecture.vision.image_size
            dtype = torch.uint8 if self.normalizes else torch.float32
            images = torch.empty(pairs, 3, *size, dtype=dtype, device=self.groups.device)
        images = self._broadcast(images, self.groups.tensor)
        if self.normalizes:
            images = normalize(images, self.preprocess)
        return Pictures(images.to(self.dtype), self._kept_patches(step, number))

    def _kept_patches(self, step: int, number: int) -> Tensor | None:
        """By the positions of the microbatch, which every rank knows."""
        vision = self.architecture.vision
        if vision.patches_kept == vision.patches:
            return None
        positions = self._slice.microbatches(step)[number]
        kept = kept_patches_of_batch(
            self.seed, step + 1, positions, vision.patches, vision.patches_kept
        )
        return self._copies.copy_small(torch.from_numpy(kept), self.groups.device)

    def _broadcast(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """From the first rank of the group."""
        tensor = tensor.to(self.groups.device, non_blocking=True)
        if group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
        return tensor
