"""The weights that a run begins with: of one checkpoint, or of one for each tower; positions of
another size interpolated, projections kept or new.

`find_initial_weights` settles this once, on rank 0; `InitialReader` then reads, on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from parallel_clip.convert.initial_sources import InitialSource
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_source
from parallel_clip.convert.tensor_fit import (
    ALL_PARTS,
    PROJECTIONS,
    Part,
    Shape,
    part_of,
    parts_in_words,
)
from parallel_clip.convert.weight_source import WeightSource
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.compare import Tower
from parallel_clip.model.resize_positions import PositionGrid, position_grids, resize_embedding

# A model trained with InfoNCE has no bias; with which one that goes on with sigmoid begins:
# plan/logit_start.py.
_OPTIONAL = ("logit_bias",)


@dataclass(frozen=True)
class InitialWeights:
    """Where the weights that a run begins with are from. What is from nowhere is drawn at random.

    sources: paths, each with the parts of the model that come from it; resized: the grid of the
    source's positions, by the names of those that are interpolated; drawn: names that are of these
    parts and drawn at random all the same; lacks_bias: whether the logit parameters are from a
    source that has no bias, and the model has one.
    """

    sources: tuple[tuple[str, frozenset[Part]], ...]
    resized: Mapping[str, PositionGrid]
    drawn: frozenset[str]
    lacks_bias: bool = False

    def __str__(self) -> str:
        if len(self.sources) == 1 and self.sources[0][1] == ALL_PARTS:
            return self.sources[0][0]
        told = [f"{path} ({parts_in_words(parts)})" for path, parts in self.sources]
        rest = ALL_PARTS.difference(*(parts for _, parts in self.sources))
        return ", ".join(told) + f"; random: {parts_in_words(rest)}" * bool(rest)


class InitialReader:
    """Reads the weights that have been settled; one tensor at a time."""

    def __init__(self, initial: InitialWeights, architecture: Architecture):
        self._initial = initial
        self._grids = position_grids(architecture)
        self._weights: dict[Part, ModelWeights] = {}
        for path, parts in initial.sources:  # rank 0 has verified them when it planned
            weights = _part_weights(open_source(path, verify=False), architecture, parts)
            self._weights |= dict.fromkeys(parts, weights)

    def read(self, name: str) -> Tensor | None:
        """A full tensor on the CPU; None: it is drawn at random.

        Raises:
            InputError: as `ModelWeights.read`.
        """
        weights = self._weights.get(part_of(name))
        if weights is None or name in self._initial.drawn:
            return None
        tensor, old = weights.read(name), self._initial.resized.get(name)
        if tensor is None or old is None:
            return tensor
        return resize_embedding(tensor, old, self._grids[name])


def find_initial_weights(
    sources: Sequence[InitialSource],
    architecture: Architecture,
    named: Architecture,
    projection: Literal["keep", "new"] = "keep",
) -> tuple[InitialWeights, list[str]]:
    """Where each parameter of `architecture` is from, and what to tell the user.

    named: the model before its sizes were changed, which a file that says nothing of itself may be
    of. Every tensor's name and shape is checked; none is read.

    Raises:
        InputError: tensors are missing, of another shape or not part of the model; or projections
            do not fit and are to be kept.
    """
    resized: dict[str, PositionGrid] = {}
    notes: list[str] = []
    weights = {}
    for initial in sources:
        weights[initial] = held = _part_weights(initial.source, architecture, initial.parts)
        notes += held.notes
        for name, new in position_grids(architecture).items():
            if part_of(name) in initial.parts:
                old = _stored_grid(held, name, new, named)
                if old != new:
                    resized[name] = old
                    notes.append(_resize_note(architecture, part_of(name), old, new))
    drawn, projection_notes = _drawn_projections(weights, architecture, projection)
    where = tuple((initial.path, initial.parts) for initial in sources)
    lacks_bias = architecture.init_logit_bias is not None and any(
        "logits" in initial.parts and "logit_bias" not in held.stored_names
        for initial, held in weights.items()
    )
    found = InitialWeights(where, resized, drawn, lacks_bias)
    return found, [*dict.fromkeys(notes), *projection_notes]


def _part_weights(
    source: WeightSource, architecture: Architecture, parts: frozenset[Part]
) -> ModelWeights:
    return ModelWeights(source, architecture, _OPTIONAL, parts=parts, to_adapt=True)


# -------------------------------------------------------------------------------------- positions


def _stored_grid(
    weights: ModelWeights, name: str, new: PositionGrid, named: Architecture
) -> PositionGrid:
    """The grid of the positions that a source has, by what it says of itself, else by `named`, else
    by their number."""
    number, part, own = weights.stored_shapes[name][-2], part_of(name), weights.metadata
    if own.architecture is not None:
        grid = _grids_by_part(own.architecture)[part]
        if grid.length != number:
            raise InputError(
                f"{own.said_by} says that there are {grid.length:,} positions in the {part} tower, "
                f"and {weights.stored_names[name]} in {own.path} has {number:,}; bring the file "
                "that belongs to it"
            )
        return grid
    for grid in (_grids_by_part(named)[part], new):
        if grid.length == number:
            return grid
    if part == "text":
        return PositionGrid((number,))
    side = math.isqrt(number - new.before)
    if side**2 + new.before != number:
        raise InputError(
            f"{own.path} does not say of which image size it is, and the {number - new.before:,} "
            "positions of its vision tower are no square; bring the open_clip_config.json that "
            "belongs to it"
        )
    return PositionGrid((side, side), new.before)


def _grids_by_part(architecture: Architecture) -> dict[Part, PositionGrid]:
    return {part_of(name): grid for name, grid in position_grids(architecture).items()}


def _resize_note(
    architecture: Architecture, tower: Part, old: PositionGrid, new: PositionGrid
) -> str:
    what = f"{tower} positions interpolated from {old} to {new}"
    if tower == "text":
        return f"{what} (linear, as OpenCLIP)"
    is_timm = "timm_model_name" in architecture.json["vision_cfg"]
    note = f"{what} (bicubic, antialias, as {'timm' if is_timm else 'OpenCLIP'})"
    has_rotary = getattr(architecture.vision, "rotary", None) is not None
    return f"{note}; rotary ones computed for {new}" if has_rotary else note


# ------------------------------------------------------------------------------------ projections


def _drawn_projections(
    weights: Mapping[InitialSource, ModelWeights],
    architecture: Architecture,
    projection: Literal["keep", "new"],
) -> tuple[frozenset[str], list[str]]:
    """The names of the projections that are drawn anew, and a note on them: those that the sources'
    do not fit; where all fit and new ones are wanted, all."""
    table = [p for p in parameter_table(architecture) if _short(p.name) in PROJECTIONS]
    towers: list[Tower] = ["vision", "text"]
    loaded = {t: initial for initial in weights for t in towers if t in initial.parts}
    misfits = {
        tower: complaint
        for tower, initial in loaded.items()
        if (complaint := _projection_misfit(weights[initial], architecture, tower))
    }
    if projection == "keep":
        if misfits:
            complaints = [f"{loaded[t].key} {loaded[t].path}: {misfits[t]}" for t in misfits]
            raise InputError(
                f"{'; '.join(complaints)}. init.projection=new begins with random projections and "
                "takes all else"
            )
        return frozenset(), []
    drawn = [p.name for p in table if part_of(p.name) in (misfits or loaded)]
    if not drawn and not misfits:
        raise InputError(
            f"init.projection=new is for projections, and {architecture.name} has none "
            f"in {' and '.join(loaded)}; leave it out"
        )
    left = [f"{misfits[tower]}: left out" for tower in misfits if not _names_of(drawn, tower)]
    told = [f"{', '.join(drawn)}: random, by init.projection=new"] if drawn else []
    return frozenset(drawn), [*told, *left]


def _names_of(names: Sequence[str], tower: Tower) -> list[str]:
    return [name for name in names if part_of(name) == tower]


def _projection_misfit(
    weights: ModelWeights, architecture: Architecture, tower: Tower
) -> str | None:
    """Why a source's projection of a tower is not the model's; None where it is."""
    wanted = {
        _short(p.name): p.shape
        for p in parameter_table(architecture)
        if part_of(p.name) == tower and _short(p.name) in PROJECTIONS
    }
    found = {**weights.stored_shapes, **weights.other_projections}
    held = {
        _short(name): shape
        for name, shape in found.items()
        if part_of(name) == tower and _short(name) in PROJECTIONS
    }
    if held == wanted:
        return None
    width = getattr(architecture, tower).width
    theirs, ours = _features(held, width), _features(wanted, width)
    if theirs != ours:
        return (
            f"its {tower} features are of {theirs:,} numbers (embed_dim), and those of "
            f"{architecture.name} of {ours:,}"
        )
    has, wants = (", ".join(names) or "none" for names in (held, wanted))
    return f"its {tower} projection is another ({has}) than that of {architecture.name} ({wants})"


def _features(projection: Mapping[str, Shape], width: int) -> int:
    """How wide the features are that a tower of `width` with these tensors gives."""
    for name, shape in projection.items():
        if name.endswith("weight"):
            return shape[0]
        if not name.endswith("bias"):
            return shape[-1]  # OpenCLIP's matrices are multiplied from the right
    return width


def _short(name: str) -> str:
    return name.removeprefix("text.")
