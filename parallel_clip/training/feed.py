"""From the loader to the device: one rank of each copy of the model reads, and shares what it read.

Pictures go to the tensor ranks of the first stage; tokens to all ranks of all stages, as texts are
pooled where the end-of-text token is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from parallel_clip.pipeline.forward_backward import MicrobatchInputs


@dataclass(frozen=True)
class StepBatch:
    """A data rank's share of one global batch. `read` and what comes of it is there on the rank
    that read it, and empty on the others that share the model with it."""

    inputs: list[MicrobatchInputs]
    read: Sequence[Microbatch]

    @property
    def bad(self) -> list[BadSample]:
        return [sample for microbatch in self.read for sample in microbatch.bad]

    def of_sources(self, sources: int) -> list[int]:
        """How many pairs of each source were read."""
        read = [address.source for microbatch in self.read for address in microbatch.addresses]
        return np.bincount(np.array(read, np.int64), minlength=sources).tolist()


class DeviceFeed:
    """Yields the batch of each step from `first_step` (counted from 0) on.

    loader: given where `groups.reads_data`, None on the others.
    """

    def __init__(
        self,
        loader: TrainingLoader | None,
        architecture: Architecture,
        plan: BatchPlan,
        groups: Groups,
        dtype: torch.dtype,
        seed: int,
    ):
        self._loader = loader
        self._architecture = architecture
        self._plan = plan
        self._groups = groups
        self._dtype = dtype
        self._seed = seed

    def batches(self, first_step: int, steps: int) -> Iterator[StepBatch]:
        source = iter(self._loader) if self._loader is not None else None
        for step in range(first_step, steps):
            read = next(source) if source is not None else []
            inputs = [
                self._share(step, read[i] if source is not None else None)
                for i in range(self._plan.microbatches)
            ]
            yield StepBatch(inputs, read)

    def _share(self, step: int, microbatch: Microbatch | None) -> MicrobatchInputs:
        """Put a microbatch on the device of every rank that works on it."""
        pairs, text = self._plan.micro_batch, self._architecture.text
        if microbatch is None:
            tokens = torch.empty(pairs, text.context_length, dtype=torch.int64)
        else:
            tokens = microbatch.tokens
        groups = self._groups
        if groups.pipeline_rank == 0:
            tokens = self._broadcast(tokens, groups.tensor)
        tokens = self._broadcast(tokens, groups.pipeline)
        if groups.pipeline_rank > 0:
            return MicrobatchInputs(None, tokens)
        images, positions = self._share_pictures(microbatch)
        return MicrobatchInputs(images, tokens, self._kept_patches(step, positions))

    def _share_pictures(self, microbatch: Microbatch | None) -> tuple[Tensor, Tensor]:
        """Pictures and their positions in the order, on every tensor rank of the first stage."""
        if microbatch is None:
            pairs, size = self._plan.micro_batch, self._architecture.vision.image_size
            images = torch.empty(pairs, 3, *size, dtype=self._dtype)
            positions = torch.empty(pairs, dtype=torch.int64)
        else:
            images, positions = microbatch.images.to(self._dtype), microbatch.positions
        group = self._groups.tensor
        return self._broadcast(images, group), self._broadcast(positions, group)

    def _kept_patches(self, step: int, positions: Tensor) -> Tensor | None:
        vision = self._architecture.vision
        if vision.patches_kept == vision.patches:
            return None
        kept = kept_patches_of_batch(
            self._seed, step + 1, positions.tolist(), vision.patches, vision.patches_kept
        )
        return torch.from_numpy(kept).to(self._groups.device)

    def _broadcast(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """From the first rank of the group."""
        tensor = tensor.to(self._groups.device, non_blocking=True)
        if group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
        return tensor
