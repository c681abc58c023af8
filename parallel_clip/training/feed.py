"""From the loader to the device: one rank of each copy of the model reads, and broadcasts it.

Tokens go to all ranks of all stages when a step begins, as texts are pooled where the end-of-text
token is. Pictures go to the tensor ranks of the first stage, one microbatch ahead of the schedule,
in each pass anew.
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

from parallel_clip.data.feeding.loader import TrainingLoader
from parallel_clip.data.feeding.training_data import BadSample, Microbatch
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

    loader: given where `groups.reads_data`, None on the others; dtype: of the pictures.
    """

    loader: TrainingLoader | None
    architecture: Architecture
    plan: BatchPlan
    groups: Groups
    dtype: torch.dtype
    seed: int

    def batches(self, first_step: int, steps: int) -> Iterator[StepBatch]:
        """The batch of each step from `first_step` (counted from 0) on."""
        source = iter(self.loader) if self.loader is not None else None
        for step in range(first_step, steps):
            read = next(source) if source is not None else []
            tokens = [
                self._share_tokens(read[number] if read else None)
                for number in range(self.plan.microbatches)
            ]
            yield StepBatch(StepInputs(tokens, partial(self._share_pictures, step, read)), read)

    def _share_tokens(self, microbatch: Microbatch | None) -> Tensor:
        """A microbatch's tokens, on every rank that shares the model."""
        pairs, context = self.plan.micro_batch, self.architecture.text.context_length
        groups = self.groups
        if microbatch is None:
            tokens = torch.empty(pairs, context, dtype=torch.int64, device=groups.device)
        else:
            tokens = microbatch.tokens
        if groups.pipeline_rank == 0:
            tokens = self._broadcast(tokens, groups.tensor)
        return self._broadcast(tokens, groups.pipeline)

    def _share_pictures(self, step: int, read: Sequence[Microbatch], number: int) -> Pictures:
        """A microbatch's pictures, on every tensor rank of the first stage."""
        group, device = self.groups.tensor, self.groups.device
        if read:
            images, positions = read[number].images.to(self.dtype), read[number].positions
        else:
            pairs, size = self.plan.micro_batch, self.architecture.vision.image_size
            images = torch.empty(pairs, 3, *size, dtype=self.dtype, device=device)
            positions = torch.empty(pairs, dtype=torch.int64, device=device)
        images = self._broadcast(images, group)
        return Pictures(images, self._kept_patches(step, self._broadcast(positions, group)))

    def _kept_patches(self, step: int, positions: Tensor) -> Tensor | None:
        vision = self.architecture.vision
        if vision.patches_kept == vision.patches:
            return None
        kept = kept_patches_of_batch(
            self.seed, step + 1, positions.tolist(), vision.patches, vision.patches_kept
        )
        return torch.from_numpy(kept).to(self.groups.device)

    def _broadcast(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """From the first rank of the group."""
        tensor = tensor.to(self.groups.device, non_blocking=True)
        if group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
        return tensor
