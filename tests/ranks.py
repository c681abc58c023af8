"""The model, its inputs and its tensors on the ranks of a layout. Used by cases; no open_clip here.

`weights` are full tensors by their OpenCLIP names, fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_clip.config import Config, config_from_dict
from parallel_clip.engine.groups import Groups
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.clip import CLIPModel
from parallel_clip.model.megatron_config import ModelOptions
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import Parameter, load_slice, local_slice
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.pipeline.inputs import Pictures, StepInputs
from parallel_clip.plan.build import build_planned_state
from parallel_clip.plan.layout_plan import make_layout_plan
from parallel_clip.stages.stage import whole_model

Weights = dict[str, Tensor]


def unsplit_model(
    architecture: Architecture, options: ModelOptions, tensor_group: dist.ProcessGroup
) -> CLIPModel:
    """A rank's slice of the model where there is no pipeline; weights are not set."""
    stages = [whole_model(architecture.vision.layers, architecture.text.layers)]
    return CLIPModel(architecture, options, tensor_group, stages)


def loaded_model(
    groups: Groups, model_cfg: dict[str, Any], weights: Weights, **options: Any
) -> CLIPModel:
    """A rank's slice of the model, in training mode; `options` as in ModelOptions."""
    architecture = architecture_from_json(model_cfg, "small")
    model = unsplit_model(architecture, ModelOptions(**options), groups.tensor)
    for parameter, tensor in model.global_parameters():
        load_slice(tensor, parameter, weights[parameter.name], groups.tensor)
    return model


def config_of(layout: Layout, **settings: Any) -> Config:
    """An fp32 config for this layout unless `settings` say otherwise; sections may be partial."""
    settings.setdefault("precision", "fp32")
    settings.setdefault("batch", {"global": 12 * layout.data, "micro": 1})  # fits any pipeline
    parallel = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "sequence": layout.sequence,
    }
    settings["parallel"] = parallel | settings.get("parallel", {})
    settings.setdefault("train", {"steps": 1})
    return config_from_dict({"data": {"train": [{"shards": "unused.tar"}]}, **settings})


def loaded_training(
    groups: Groups, config: Config, architecture: Architecture, weights: Weights
) -> TrainState:
    """Model, data-parallel wrapping and optimizer of a rank, with these weights."""
    built = empty_training(groups, config, architecture)
    for parameter, tensor in built.global_parameters():
        part = local_slice(
            weights[parameter.name], parameter.placement, groups.tensor_rank, groups.layout.tensor
        )
        built.set_weight(tensor, part)
    if built.average is not None:
        built.average.start()
    return built


def empty_training(groups: Groups, config: Config, architecture: Architecture) -> TrainState:
    """Likewise, without weights."""
    plan = make_layout_plan(architecture.costs, groups.layout.world, config)
    return build_planned_state(config, architecture, plan, groups)


def own_microbatches(
    groups: Groups, images: Tensor, tokens: Tensor, count: int, kept: Tensor | None = None
) -> StepInputs:
    """This data rank's share of a global batch, in `count` microbatches; pictures on the first
    stage only."""
    ranks, rank = groups.layout.data, groups.data_rank
    images, tokens, kept = (
        [None] * count if x is None else x.chunk(ranks)[rank].chunk(count)
        for x in (images, tokens, kept)
    )

    def fetch(number: int) -> Pictures:
        assert groups.pipeline_rank == 0, "pictures are for the first stage"
        return Pictures(images[number], kept[number])

    return StepInputs(tokens, fetch)


def sum_over_tokens(tensor: Tensor, values: Tensor, groups: Groups) -> Tensor:
    """What megatron-core's finalize step does to gradients that each cover a rank's own tokens."""
    if getattr(tensor, "sequence_parallel", False):
        dist.all_reduce(values, group=groups.tensor)
    return values


def whole_tensors(
    table: Sequence[Parameter], ranks: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """All full tensors from what each rank of one copy of the model holds, by name."""
    held = {p.name: [rank[p.name] for rank in ranks if p.name in rank] for p in table}
    return {p.name: whole_tensor(p, held[p.name]) for p in table}


def copies(layout: Layout, answers: Sequence[Any]) -> list[list[Any]]:
    """The answers of the ranks that share a copy of the model, for each data rank."""
    found: list[list[Any]] = [[] for _ in range(layout.data)]
    for rank, answer in enumerate(answers):
        found[layout.coordinates(rank).data].append(answer)
    return found


def whole_tensor(parameter: Parameter, parts: Sequence[Tensor]) -> Tensor:
    """A full tensor from what each tensor rank holds; a replicated one must be equal on all, and
    padding be zero."""
    axis, size = parameter.placement.axis, len(parts)
    if axis is None:
        for part in parts[1:]:
            assert torch.equal(part, parts[0]), f"{parameter.name} differs between tensor ranks"
        return parts[0]
    whole = parts[0].new_full(parameter.shape, torch.nan)
    for rank, part in enumerate(parts):
        padding = part.flatten()[padding_mask(parameter, rank, size).flatten()]
        assert not padding.any(), f"{parameter.name}: padding of rank {rank} is not zero"
        for segment in parameter.placement.segments(parameter.shape[axis], rank, size):
            piece = part.narrow(axis, segment.local, segment.length)
            whole.narrow(axis, segment.whole, segment.length).copy_(piece)
    assert not whole.isnan().any(), f"{parameter.name} is not held in full"
    return whole


def padding_mask(parameter: Parameter, rank: int, size: int) -> Tensor:
    """Which entries of a tensor rank's part of a parameter are padding: bool, of its shape."""
    mask = torch.ones(parameter.local_shape(size), dtype=torch.bool)
    axis = parameter.placement.axis
    if axis is None:
        return ~mask
    for segment in parameter.placement.segments(parameter.shape[axis], rank, size):
        mask.narrow(axis, segment.local, segment.length).fill_(False)
    return mask
