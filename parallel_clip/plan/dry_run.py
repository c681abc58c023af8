"""What a rank of any layout would hold in memory: counted, not estimated.

The trainer's own code is run, in a fake world or in a real one, and what it allocates is added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_clip.config import Config
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architectures import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.plan.saved_activations import SavedActivations, memory_of
from parallel_clip.training.build import build
from parallel_clip.training.optimizer import MOMENTS, Optimizer


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds, in bytes but for `parameters`, which are counted.

    `weights` are those of the forward pass; `optimizer` the fp32 masters, where the weights are not
    fp32 themselves, and both of Adam's moments. `replicated` is the part of all these that every
    tensor rank holds in full. `activations`: what the forward pass of one microbatch keeps for its
    backward pass, for each stage that the rank holds by part of the model; the loss, which sees the
    whole batch, is not in it.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    replicated: int
    activations: tuple[dict[str, int], ...]

    @property
    def state(self) -> int:
        """All that stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def saved(self) -> int:
        """Of one microbatch in all of the rank's stages."""
        return sum(self.saved_by_chunk)

    @property
    def saved_by_chunk(self) -> list[int]:
        return [sum(of_chunk.values()) for of_chunk in self.activations]


def dry_run(config: Config, architecture: Architecture, layout: Layout, rank: int = 0) -> RankBytes:
    """What `rank` of `layout` would hold. Takes seconds, and a process that is alone so far."""
    with fake_rank(layout, rank) as groups:
        return count_rank(config, architecture, groups)


def count_rank(config: Config, architecture: Architecture, groups: Groups) -> RankBytes:
    """Build what the trainer builds, run one microbatch forward through each stage that the rank
    holds, and count: with fake tensors in a fake world, with real ones in a real world."""
    built = build(config, architecture, groups)
    held, optimizer = built.global_parameters(), built.optimizer
    weights = [tensor for _, tensor in held]
    gradients = [weight.main_grad for weight in weights]
    whole = [tensor for parameter, tensor in held if parameter.placement.axis is None]
    return RankBytes(
        parameters=sum(weight.numel() for weight in weights),
        weights=_bytes_of(weights),
        gradients=_bytes_of(gradients),
        optimizer=_bytes_of(_optimizer_state(optimizer, weights), besides=weights),
        replicated=sum(weight.nbytes + weight.main_grad.nbytes for weight in whole)
        + _bytes_of(_optimizer_state(optimizer, whole), besides=weights),
        activations=tuple(
            saved_activations(chunk, config.batch.micro, groups.device) for chunk in built.chunks
        ),
    )


def saved_activations(model: CLIPModel, pairs: int, device: torch.device) -> dict[str, int]:
    vision, text = model.architecture.vision, model.architecture.text
    tokens = torch.zeros(pairs, text.context_length, dtype=torch.int64, device=device)
    images = kept = None
    if model.stage.is_first:
        images = torch.zeros(pairs, 3, *vision.image_size, device=device)
        if vision.patch_dropout:
            kept = torch.arange(vision.patches_kept, device=device).expand(pairs, -1)
    else:
        model.received = torch.zeros(
            model.message_length(pairs), 1, 1, dtype=model.config.pipeline_dtype, device=device
        ).requires_grad_()
    inputs = [x for x in (images, tokens) if x is not None]
    with SavedActivations(model, excluded=inputs) as saved:
        features = model(images, tokens, kept)
    del features  # it held what was counted
    return saved.by_module


def _optimizer_state(optimizer: Optimizer, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Masters and moments; the moments are made, as the first step would make them."""
    for weight in weights:
        optimizer.set_moments(weight, {name: torch.zeros_like(weight, dtype=torch.float32)
                                       for name in MOMENTS}, step=0)  # fmt: skip
        owned = optimizer.owned_state(weight)
        if owned is not None:
            yield owned.master
            yield from owned.moments.values()


def _bytes_of(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """The memory behind tensors, each piece once, padding of their buffers included."""
    known = {memory_of(tensor) for tensor in besides}
    pieces = {memory_of(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(piece.nbytes() for memory, piece in pieces.items() if memory not in known)
