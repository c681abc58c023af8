"""Memory of a rank, counted by running the trainer's own code on fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from parallel_clip.config import Config
from parallel_clip.engine.device import has_cuda
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.engine.without_gpus import call_without_gpus
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.adamw import MegatronAdamW
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.orders import peak_graphs_of_step
from parallel_clip.plan.build import build_planned_state, frozen_parts
from parallel_clip.plan.layout_plan import LayoutPlan
from parallel_clip.plan.saved_activations import SavedActivations, storage_id


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds, in bytes but for `parameters`, which are counted.

    `weights` are those of the forward pass; `optimizer` the fp32 masters, where the weights are not
    fp32 themselves, and both of Adam's moments; `averages` those of `ema.decay`. `replicated` is
    the part of all these that every tensor rank holds in full. `activations`: what the forward pass
    of one microbatch keeps for its backward pass, for each stage that the rank holds by part of the
    model; the loss, which sees the whole batch, is not in it. `pictures`: those of one microbatch,
    on the first stage alone; `pictures_ahead`: those of the next, which come as bytes;
    `keeps_pictures`: whether the backward pass needs them.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    replicated: int
    activations: tuple[dict[str, int], ...]
    pictures: int = 0
    pictures_ahead: int = 0
    keeps_pictures: bool = True
    averages: int = 0

    @property
    def state(self) -> int:
        """All that stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.averages

    @property
    def saved(self) -> int:
        """Activations of one microbatch in all of the rank's stages."""
        return sum(self.saved_by_chunk)

    @property
    def saved_by_chunk(self) -> list[int]:
        return [sum(of_chunk.values()) for of_chunk in self.activations]


# ---------------------------------------------------------------------------------- counting


def count_stages(
    config: Config, architecture: Architecture, plan: LayoutPlan
) -> tuple[RankMemory, ...]:
    """What the first rank of each pipeline stage holds. Takes seconds a stage, and touches no GPU.

    Raises RuntimeError in a process that has joined a process group.
    """
    if has_cuda():
        return call_without_gpus(count_stages, config, architecture, plan)
    ranks_in_stage = plan.layout.data * plan.layout.tensor
    return tuple(
        dry_run(config, architecture, plan, pipeline_rank * ranks_in_stage)
        for pipeline_rank in range(plan.layout.pipeline)
    )


def dry_run(
    config: Config, architecture: Architecture, plan: LayoutPlan, rank: int = 0
) -> RankMemory:
    """What `rank` of the layout holds. As `count_stages`."""
    with fake_rank(plan.layout, rank) as groups:
        return measure_rank_memory(config, architecture, plan, groups)


def measure_rank_memory(
    config: Config, architecture: Architecture, plan: LayoutPlan, groups: Groups
) -> RankMemory:
    """Build what the trainer builds, run one microbatch forward through each stage that the rank
    holds, and count: with fake tensors in a fake world, with real ones in a real world."""
    state = build_planned_state(config, architecture, plan, groups)
    held, optimizer = state.global_parameters(), state.optimizer
    weights = [tensor for _, tensor in held]
    whole = [tensor for parameter, tensor in held if parameter.placement.axis is None]
    pairs, pixels = plan.batch.micro_batch, 0
    if state.chunks[0].stage.is_first:
        pixels = pairs * 3 * prod(architecture.vision.image_size)
    return RankMemory(
        parameters=sum(weight.numel() for weight in weights),
        weights=_bytes_of(weights),
        gradients=_bytes_of(weight.main_grad for weight in weights if weight.requires_grad),
        optimizer=_bytes_of(_optimizer_state(optimizer, weights), besides=weights),
        replicated=sum(weight.nbytes for weight in whole)
        + sum(weight.main_grad.nbytes for weight in whole if weight.requires_grad)
        + _bytes_of(_optimizer_state(optimizer, whole), besides=weights)
        + _bytes_of(_averages(state, whole)),
        activations=tuple(saved_activations(chunk, pairs, groups.device) for chunk in state.chunks),
        pictures=pixels * state.chunks[0].config.params_dtype.itemsize,
        pictures_ahead=pixels,
        keeps_pictures=not frozen_parts(architecture, config.freeze).vision.layers.embedding,
        averages=_bytes_of(_averages(state, weights)),
    )


def saved_activations(model: CLIPModel, pairs: int, device: torch.device) -> dict[str, int]:
    """Bytes that a forward pass of `pairs` keeps for backward, by part of the model; a pair is a
    picture with all its texts."""
    return saved_beside_message(model, pairs, device, counts_message=True)[0]


def saved_beside_message(
    model: CLIPModel, pairs: int, device: torch.device, counts_message: bool = False
) -> tuple[dict[str, int], bool]:
    """As `saved_activations`, but for what the stage before hands on, unless `counts_message`; and
    whether that is kept."""
    (images, tokens, kept), message = stage_inputs(model, pairs, device)
    inputs = [x for x in (images, tokens) if x is not None]
    if message is not None and not counts_message:
        inputs.append(message)
    with SavedActivations(model, excluded=inputs) as saved:
        features = model(images, tokens, kept)
    del features  # it held what was counted
    return saved.by_module, message is not None and saved.was_kept(message)


def stage_inputs(
    model: CLIPModel, pairs: int, device: torch.device
) -> tuple[tuple[Tensor | None, Tensor, Tensor | None], Tensor | None]:
    """Zeros for a stage: the arguments of its forward pass, and the message that it is handed; None
    for what it does not take."""
    vision, text = model.architecture.vision, model.architecture.text
    texts = pairs * model.captions
    tokens = torch.zeros(texts, text.context_length, dtype=torch.int64, device=device)
    images = kept = message = None
    if model.stage.is_first:
        dtype = model.config.params_dtype  # in which they are fed
        images = torch.zeros(pairs, 3, *vision.image_size, dtype=dtype, device=device)
        if vision.patches_kept < vision.patches:
            kept = torch.arange(vision.patches_kept, device=device).expand(pairs, -1)
    else:
        length = model.messages.length(pairs, training=True)
        message = torch.zeros(length, 1, 1, dtype=model.config.pipeline_dtype, device=device)
        model.set_input_tensor([message.requires_grad_()])
    return (images, tokens, kept), message


def _optimizer_state(optimizer: MegatronAdamW, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Masters and moments; the moments are made, as the first step would make them."""
    for weight in (weight for weight in weights if weight.requires_grad):
        zeros = torch.zeros_like(weight, dtype=torch.float32)
        optimizer.set_moments(weight, dict.fromkeys(MOMENTS, zeros), step=0)
        owned = optimizer.owned_state(weight)
        if owned is not None:
            yield owned.master
            yield from owned.moments.values()


def _averages(state: TrainState, weights: Iterable[Tensor]) -> Iterator[Tensor]:
    if state.average is not None:
        yield from filter(lambda part: part is not None, map(state.average.of, weights))


def _bytes_of(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """The memory behind tensors, each piece once, padding of their buffers included."""
    known = {storage_id(tensor) for tensor in besides}
    pieces = {storage_id(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(piece.nbytes() for memory, piece in pieces.items() if memory not in known)


# -------------------------------------------------------------- arithmetic on what was counted


class PeakMemory(NamedTuple):
    """Bytes that a rank holds at the fullest moment of a step, beside what stays."""

    activations: int
    pictures: int


def peak_memory(plan: LayoutPlan, pipeline_rank: int, stash: int, held: RankMemory) -> PeakMemory:
    """The saved activations and pictures of a step that keeps the graphs of `stash` microbatches.

    Backward needs the pictures of every microbatch that has a graph on the first stage, if their
    embedding is trained, and those of one more are fetched ahead.
    """
    layout, count, kept = plan.layout, plan.batch.microbatches, 1
    place = pipeline_rank, layout.pipeline, count, stash
    if held.keeps_pictures:
        kept = peak_graphs_of_step(*place, [1, *[0] * (layout.virtual_pipeline - 1)])
    pictures = held.pictures * min(kept, count) + held.pictures_ahead * (count > 1)
    return PeakMemory(peak_graphs_of_step(*place, held.saved_by_chunk), pictures)
