"""The weights of a source for one architecture, or for some of its parts, checked to fit it.

Which of the source's tensors they are: tensor_fit.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from parallel_clip.convert.tensor_fit import (
    ALL_PARTS,
    LOGIT_PARAMETERS,
    Part,
    Shape,
    find_fit,
    misfit,
    parts_in_words,
)
from parallel_clip.convert.weight_source import WeightSource
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table

_VALUES = 1 << 20  # that are looked at together


class ModelWeights:
    """A source's tensors for one architecture, checked to fit it before anything is read.

    optional: names that the source may lack; `read` gives None for those. option: what names the
    model to the user, for messages. parts: of the model that are taken from the source, whatever
    else it holds; to_adapt: as in `find_fit`. `notes`: what the user should be told of the source.

    Raises:
        InputError: tensors are missing, of another shape, or not part of the model.
    """

    def __init__(
        self,
        source: WeightSource,
        architecture: Architecture,
        optional: tuple[str, ...] = (),
        option: str = "model.name",
        parts: Collection[Part] = ALL_PARTS,
        to_adapt: bool = False,
    ):
        self.architecture = architecture
        self.metadata = source.metadata
        self.notes = source.metadata.notes
        self._source = source
        shapes, path = source.shapes(), source.metadata.path
        table = parameter_table(architecture)
        self._fit = fit = find_fit(shapes, path, table, optional, parts, to_adapt)
        if fit.problems:
            model = architecture.name
            if parts != ALL_PARTS:
                model = f"the {parts_in_words(parts)} of {model}"
            raise InputError(misfit(fit, shapes, model, source.metadata, option))
        if fit.prefix:
            self.notes += (
                f"the names of the tensors in {path} begin with {fit.prefix!r}, which is left out",
            )

    @property
    def stored_names(self) -> Mapping[str, str]:
        """The name in the source of each parameter that it has."""
        return self._fit.names

    @property
    def stored_shapes(self) -> Mapping[str, Shape]:
        """The shape in the source of each parameter that it has."""
        return self._fit.shapes

    @property
    def other_projections(self) -> Mapping[str, Shape]:
        """The shapes of projections that the source has in place of the model's, by their names in
        an OpenCLIP state dict."""
        return self._fit.beside

    def read(self, name: str) -> Tensor | None:
        """A full tensor on the CPU, in its stored precision; None where the source lacks it.

        Raises:
            InputError: it cannot be taken for weights (plain_tensors.py), or is not finite in fp32.
        """
        stored = self._fit.names.get(name)
        if stored is None:
            return None
        tensor, path = self._source.read(stored), self.metadata.path
        bad = count_not_finite(tensor)
        if bad and tensor.dtype == torch.float64 and torch.isfinite(tensor).all():
            raise InputError(
                f"{stored} in {path} has values up to {float(tensor.abs().max()):.4g}, which are "
                "infinite in fp32, as which weights are trained"
            )
        if bad:
            raise InputError(
                f"{stored} in {path} is not finite: {bad:,} of its {tensor.numel():,} values are "
                "NaN or infinite; take an earlier checkpoint, or one of higher precision"
            )
        return tensor.reshape(()) if name in LOGIT_PARAMETERS else tensor


def count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite in fp32."""
    parts = tensor.reshape(-1).split(_VALUES)  # each with its copies by itself
    return sum(part.numel() - int(torch.isfinite(part.float()).sum()) for part in parts)
