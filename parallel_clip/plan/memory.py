"""Memory of a rank, counted by running the trainer's own code on fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel_clip.config import Config, parse_bytes
from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout
from parallel_clip.loss.exchange_plan import peak_loss_bytes, plan_exchange
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.optimizer import MOMENTS
from parallel_clip.optimizer.adamw import MegatronAdamW
from parallel_clip.optimizer.train_state import build_train_state
from parallel_clip.pipeline.orders import microbatch_group_size, peak_graphs, step_orders
from parallel_clip.plan.layout_plan import stages_of
from parallel_clip.plan.run_plan import Job, model_options
from parallel_clip.plan.saved_activations import SavedActivations, storage_id


def stage_memory(job: Job, pipeline_rank: int) -> RankMemory:
    """What the first rank of a stage holds."""
    layout = job.layout
    rank = pipeline_rank * layout.data * layout.tensor
    return dry_run(job.config, job.architecture, layout, rank)


def peak_activations(job: Job, pipeline_rank: int, stash: int, held: RankMemory) -> int:
    """Bytes of saved activations that a rank holds at the fullest moment of a step."""
    layout = job.layout
    orders = step_orders(layout.pipeline, job.plan.microbatches, stash, layout.virtual_pipeline)
    return peak_graphs(orders[pipeline_rank], held.saved_by_chunk)


@dataclass(frozen=True)
class RankMemory:
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


def dry_run(
    config: Config, architecture: Architecture, layout: Layout, rank: int = 0
) -> RankMemory:
    """What `rank` of `layout` would hold. Takes seconds, and a process that is alone so far."""
    with fake_rank(layout, rank) as groups:
        return measure_rank_memory(config, architecture, groups)


def measure_rank_memory(config: Config, architecture: Architecture, groups: Groups) -> RankMemory:
    """Build what the trainer builds, run one microbatch forward through each stage that the rank
    holds, and count: with fake tensors in a fake world, with real ones in a real world."""
    built = build_train_state(
        architecture,
        model_options(config, groups.layout),
        stages_of(config, architecture, groups.layout),
        groups,
        config.optimizer,
        config.parallel.distributed_optimizer,
    )
    held, optimizer = built.global_parameters(), built.optimizer
    weights = [tensor for _, tensor in held]
    gradients = [weight.main_grad for weight in weights]
    whole = [tensor for parameter, tensor in held if parameter.placement.axis is None]
    return RankMemory(
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


def _optimizer_state(optimizer: MegatronAdamW, weights: Iterable[Tensor]) -> Iterator[Tensor]:
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
    known = {storage_id(tensor) for tensor in besides}
    pieces = {storage_id(tensor): tensor.untyped_storage() for tensor in tensors}
    return sum(piece.nbytes() for memory, piece in pieces.items() if memory not in known)


def fit_stash_to_memory(job: Job) -> Job:
    """The job with as many stashed microbatches as `parallel.memory` has room for on its fullest
    stage; unchanged where the config asks for no such count. Takes seconds a stage, and a process
    that is alone so far.

    Raises:
        InputError: not even two-pass has room.
    """
    parallel = job.config.parallel
    if parallel.memory is None:
        return job
    rooms = [
        max_stash_for_stage(job, rank, parse_bytes(parallel.memory))
        for rank in range(job.layout.pipeline)
    ]
    return replace(job, stash=min(rooms))


def max_stash_for_stage(job: Job, pipeline_rank: int, memory: int) -> int:
    """The largest stash with which this rank stays within `memory` bytes."""
    held = stage_memory(job, pipeline_rank)
    free = memory - held.state
    if pipeline_rank == job.layout.pipeline - 1:
        free -= _loss_bytes(job)
    for stash in _candidates(job):
        if peak_activations(job, pipeline_rank, stash, held) <= free:
            return stash
    raise memory_too_small_error(job, pipeline_rank, memory, held)


def _candidates(job: Job) -> list[int]:
    """From all microbatches to none. With virtual stages those that run again are whole groups: a
    group in part would stall the others (see timeline.py)."""
    microbatches, layout = job.plan.microbatches, job.layout
    group = 1
    if layout.virtual_pipeline > 1:
        group = microbatch_group_size(microbatches, layout.pipeline)
    return sorted({0, *range(microbatches, 0, -group)}, reverse=True)


def _loss_bytes(job: Job) -> int:
    """What the loss holds on the last stage, where no other stage helps it."""
    settings, layout = job.config.loss, job.layout
    sizes = job.plan.per_rank, job.architecture.embed_dim, layout.data, layout.tensor
    return peak_loss_bytes(plan_exchange(settings.exchange, settings.tile, *sizes), *sizes)


def memory_too_small_error(
    job: Job, pipeline_rank: int, memory: int, held: RankMemory
) -> InputError:
    least = held.state + peak_activations(job, pipeline_rank, 0, held)
    if pipeline_rank == job.layout.pipeline - 1:
        least += _loss_bytes(job)
    return InputError(
        f"parallel.memory {job.config.parallel.memory} is too little for stage {pipeline_rank}, "
        f"which fills {least / 1e9:.2f} GB with nothing stashed; lower batch.micro "
        f"{job.plan.micro_batch}, set recompute to selective or full, or use more parallel.tensor "
        "or parallel.pipeline ranks"
    )
