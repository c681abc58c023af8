"""Weights, gradients, optimizer state and averages of a stage, by arithmetic on the table of
parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from parallel_clip.config import Config
from parallel_clip.layout import Layout
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.layer_groups import layer_groups, layer_of
from parallel_clip.model.megatron_config import DTYPES
from parallel_clip.model.parameters import Parameter
from parallel_clip.plan.build import frozen_parts
from parallel_clip.plan.gradient_buffers import buffer_size
from parallel_clip.plan.memory import RankMemory
from parallel_clip.plan.short_tower import TowerName
from parallel_clip.stages.stage import LayerRange, Stage

_STATE_FIELDS = ("parameters", "weights", "gradients", "optimizer", "replicated", "averages")


class StageStates:
    """Of one model, as one config trains it. Keeps what it has computed."""

    def __init__(self, config: Config, architecture: Architecture):
        self._frozen = frozen_parts(architecture, config.freeze)
        self._itemsize = DTYPES[config.precision].itemsize
        self._has_averages = config.ema.decay is not None
        self._table = sorted(parameter_table(architecture), key=_order_in_module)
        self._places = _places(architecture, self._table)
        self._states: dict[tuple, RankMemory] = {}

    def of(
        self, chunks: Sequence[Stage], layout: Layout, rank: int, distributed_optimizer: bool
    ) -> RankMemory:
        """What pipeline rank `rank` holds in `chunks`, its stages, from step to step."""
        splits = distributed_optimizer and layout.data > 1
        held = tuple((chunk.is_last, chunk.vision, chunk.text) for chunk in chunks)
        key = held, layout.tensor, splits and layout.data, rank == 0
        if key not in self._states:
            of_chunks = [
                self._chunk_state(chunk, layout, splits, first_stage=rank == 0) for chunk in chunks
            ]
            self._states[key] = RankMemory(
                **{name: sum(getattr(each, name) for each in of_chunks) for name in _STATE_FIELDS},
                activations=(),
                keeps_pictures=not self._frozen.vision.layers.embedding,
            )
        return self._states[key]

    def _chunk_state(
        self, chunk: Stage, layout: Layout, splits: bool, first_stage: bool
    ) -> RankMemory:
        itemsize, averages = self._itemsize, self._has_averages
        towers, logits, frozen = [], [], 0
        replicated = 0
        for parameter, place in zip(self._table, self._places, strict=True):
            if not _holds(chunk, place):
                continue
            size, is_logit = prod(parameter.local_shape(layout.tensor)), place is None
            whole = parameter.placement.axis is None
            if parameter.name in self._frozen.names:
                frozen += size
                replicated += whole * itemsize * size
            else:
                (logits if is_logit else towers).append((size, whole))
        total = RankMemory(frozen, frozen * itemsize, 0, 0, replicated, ())
        groups = [(towers, itemsize), (logits, 4)]
        if itemsize == 4:  # one dtype, one buffer
            groups = [(logits + towers, 4)]
        for tensors, bytes_each in groups:
            sizes = [size for size, _ in tensors]
            buffer = buffer_size(sizes, layout.data, splits, first_stage)
            # Masters, where the weights are not fp32 themselves, and two moments.
            state = 8 if bytes_each == 4 else 12
            owned_whole = sum(
                n for n, (_, whole) in zip(buffer.owned, tensors, strict=True) if whole
            )
            sizes_whole = sum(size for size, whole in tensors if whole)
            total = RankMemory(
                parameters=total.parameters + sum(sizes),
                weights=total.weights + bytes_each * (buffer.numbers if splits else sum(sizes)),
                gradients=total.gradients + 4 * buffer.numbers,
                optimizer=total.optimizer + state * sum(buffer.owned),
                replicated=total.replicated
                + (bytes_each + 4) * sizes_whole
                + (state + 4 * averages) * owned_whole,
                activations=(),
                averages=total.averages + 4 * averages * sum(buffer.owned),
            )
        return total


class _Place(NamedTuple):
    """Where a parameter of a tower is: in a layer, or before (-1) or behind (None) all of them."""

    tower: TowerName
    layer: int | None


def _order_in_module(parameter: Parameter) -> tuple[int, bool]:
    """The order of a torch module's parameters: its own before those of the modules in it."""
    tower = parameter.module.split(".")[0]
    return ("vision", "text").index(tower) if "." in parameter.module else -1, (
        parameter.module.count(".") > 1
    )


def _places(architecture: Architecture, table: Iterable[Parameter]) -> list[_Place | None]:
    """Of each parameter; None: it is a logit parameter."""
    groups = layer_groups(architecture)
    places = []
    for parameter in table:
        tower = parameter.module.split(".")[0]
        if tower not in ("vision", "text"):
            places.append(None)
            continue
        layer = layer_of(parameter.module)
        if layer is None and getattr(groups, tower).number[parameter.name] == 0:
            layer = -1
        places.append(_Place(tower, layer))
    return places


def _holds(stage: Stage, place: _Place | None) -> bool:
    if place is None:
        return stage.is_last
    held: LayerRange = getattr(stage, place.tower)
    if place.layer is None:
        return held.has_head
    return held.has_embedding if place.layer < 0 else held.first <= place.layer < held.stop
