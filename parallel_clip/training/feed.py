"""From the loader to the device: one rank of each tensor group reads, and shares what it read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_clip.data.loader import BadSample, Microbatch, TrainingLoader
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import BatchPlan
from parallel_clip.model.architectures import Architecture
from parallel_clip.model.patch_dropout import kept_patches_of_batch
from parallel_clip.pipeline.schedule import Inputs


@dataclass(frozen=True)
class StepBatch:
    """A data rank's share of one global batch. `read` and what comes of it is there on the rank
    that read it, and empty on the others of its tensor group."""

    inputs: list[Inputs]
    read: Sequence[Microbatch]

    @property
    def bad(self) -> list[BadSample]:
        return [sample for microbatch in self.read for sample in microbatch.bad]


class Feed:
    """Yields the batch of each step from `first_step` (counted from 0) on.

    loader: given on the first rank of each tensor group, None on the others.
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

    def _share(self, step: int, microbatch: Microbatch | None) -> Inputs:
        """Put a microbatch on the device of every rank of the tensor group."""
        pairs = self._plan.micro_batch
        vision, text = self._architecture.vision, self._architecture.text
        if microbatch is None:
            images = torch.empty(pairs, 3, *vision.image_size, dtype=self._dtype)
            tokens = torch.empty(pairs, text.context_length, dtype=torch.int64)
            positions = torch.empty(pairs, dtype=torch.int64)
        else:
            images = microbatch.images.to(self._dtype)
            tokens, positions = microbatch.tokens, microbatch.positions
        images, tokens, positions = map(self._broadcast, (images, tokens, positions))
        kept = None
        if vision.patch_dropout:
            kept = torch.from_numpy(
                kept_patches_of_batch(
                    self._seed, step + 1, positions.tolist(), vision.patches, vision.patches_kept
                )
            ).to(self._groups.device)
        return Inputs(images, tokens, kept)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._groups.device, non_blocking=True)
        group = self._groups.tensor
        if group.size() > 1:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
        return tensor
