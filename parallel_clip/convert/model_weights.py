"""The weights of a source for one architecture: found under the names that it has, and checked.

The names of an OpenCLIP state dict are those of `parameter_table`. A source may have them behind a
prefix, with the parts that wrappers of torch put between, and with or without "text." before the
text tower's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_clip.convert.weight_source import SourceMetadata, WeightSource
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.parameters import Parameter

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")
_PART = 1 << 20  # values that are looked at together

# Parts of names that DDP, torch.compile, FSDP and activation checkpointing add.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What a state dict may hold beside the parameters: the causal mask, and numbers of OpenAI's.
_NO_PARAMETERS = {
    "attn_mask",
    "text.attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
}
# What a size that differs means, by a parameter's axis: names without "text.".
_SIZES = {
    ("positional_embedding", 0): "text_cfg.context_length",
    ("token_embedding.weight", 0): "text_cfg.vocab_size",
    ("token_embedding.weight", 1): "text_cfg.width",
    ("text_projection", 1): "embed_dim",
    ("visual.conv1.weight", 0): "vision_cfg.width",
    ("visual.conv1.weight", 2): "vision_cfg.patch_size",
    ("visual.positional_embedding", 0): "1 + the patches of vision_cfg.image_size",
    ("visual.trunk.pos_embed", 1): "the patches of vision_cfg.image_size, and a class token,",
    ("visual.trunk.pos_embed", 2): "vision_cfg.width",
    ("visual.trunk.patch_embed.proj.weight", 2): "vision_cfg.patch_size",
    ("text_projection.weight", 0): "embed_dim",
}

Shape = tuple[int, ...]


class ModelWeights:
    """A source's tensors for one architecture, checked to fit it before anything is read.

    optional: names that the source may lack; `read` gives None for those. option: what names the
    model to the user, for messages. `notes`: what the user should be told of the source.

    Raises:
        InputError: tensors are missing, of another shape, or not part of the model.
    """

    def __init__(
        self,
        source: WeightSource,
        architecture: Architecture,
        optional: tuple[str, ...] = (),
        option: str = "model.name",
    ):
        self.architecture = architecture
        self.metadata = source.metadata
        self.notes = source.metadata.notes
        self._source = source
        table, path = parameter_table(architecture), source.metadata.path
        stored = _without_wrappers(source.shapes(), path)
        fits = [_fit(stored, prefix, table, optional) for prefix in _prefixes(stored, table)]
        best = min(fits, key=lambda fit: len(fit.problems))  # of several the shortest prefix
        if best.problems:
            raise InputError(_misfit(best, stored, architecture.name, source.metadata, option))
        self._stored = best.names
        if best.prefix:
            self.notes += (
                f"the names of the tensors in {path} begin with {best.prefix!r}, which is left out",
            )

    @property
    def stored_names(self) -> Mapping[str, str]:
        """The name in the source of each parameter that it has."""
        return self._stored

    def read(self, name: str) -> Tensor | None:
        """A full tensor on the CPU, in its stored precision; None where the source lacks it.

        Raises:
            InputError: it is not of floating-point numbers, or not finite in fp32.
        """
        stored = self._stored.get(name)
        if stored is None:
            return None
        tensor, path = self._source.read(stored), self.metadata.path
        if not tensor.is_floating_point():
            raise InputError(
                f"{stored} in {path} is of {tensor.dtype}; weights have to be floating-point "
                "numbers, not quantized ones"
            )
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
    parts = tensor.reshape(-1).split(_PART)  # each with its copies by itself
    return sum(part.numel() - int(torch.isfinite(part.float()).sum()) for part in parts)


@dataclass(frozen=True)
class _Fit:
    """How a table's parameters are found behind a prefix: names: global to stored ones."""

    prefix: str
    names: dict[str, str]
    missing: list[str]
    extra: list[str]
    misshapen: list[tuple[Parameter, Shape]]

    @property
    def problems(self) -> list:
        return [*self.missing, *self.extra, *self.misshapen]


def _without_wrappers(shapes: Mapping[str, Shape], path: object) -> dict[str, tuple[str, Shape]]:
    """The stored name and the shape of each tensor, by its name without the wrappers' parts."""
    found: dict[str, tuple[str, Shape]] = {}
    for name, shape in shapes.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in found:
            raise InputError(
                f"{path} holds two models: {name} beside {found[short][0]}; save one of them alone"
            )
        found[short] = name, shape
    return found


def _prefixes(stored: Mapping[str, object], table: Sequence[Parameter]) -> list[str]:
    """What may stand before all names, shortest first: what does before any of the table's."""
    found = {""}
    for name in (parameter.name for parameter in table):
        found |= {s.removesuffix(name) for s in stored if s.endswith(f".{name}")}
    return sorted(found, key=len)


def _fit(
    stored: Mapping[str, tuple[str, Shape]],
    prefix: str,
    table: Sequence[Parameter],
    optional: Sequence[str],
) -> _Fit:
    names: dict[str, str] = {}
    missing, misshapen, used = [], [], set()
    for parameter in table:
        # OpenCLIP has two classes that differ in nothing but a "text." before the text tower's
        # names; either may be loaded into the other.
        name = parameter.name
        twin = name.removeprefix("text.") if name.startswith("text.") else f"text.{name}"
        found = next((prefix + n for n in (name, twin) if prefix + n in stored), None)
        if found is None:
            if name not in optional:
                missing.append(name)
            continue
        used.add(found)
        names[name], shape = stored[found]
        is_scalar = name in LOGIT_PARAMETERS and set(shape) <= {1}
        if shape != parameter.shape and not is_scalar:
            misshapen.append((parameter, shape))
    no_parameters = {prefix + name for name in _NO_PARAMETERS}
    extra = sorted(stored.keys() - used - no_parameters)
    return _Fit(prefix, names, missing, extra, misshapen)


def _misfit(
    fit: _Fit,
    stored: Mapping[str, tuple[str, Shape]],
    model: str,
    metadata: SourceMetadata,
    option: str,
) -> str:
    """What a file holds, what is missing and what is too much, and the way out."""
    held = f" ({some_names(list(stored))})" if stored else ""
    parts = [
        f"the weights in {metadata.path} are not those of {model}",
        f"it holds {len(stored):,} tensor{'s' * (len(stored) != 1)}{held}",
    ]
    if fit.missing:
        parts.append(f"missing: {some_names(fit.missing)}")
    if fit.extra:
        parts.append(f"not part of the model: {some_names(fit.extra)}")
    if fit.misshapen:
        shapes = [f"{p.name} is {list(s)}, not {list(p.shape)}" for p, s in fit.misshapen]
        parts.append("of another shape: " + some_names(shapes))
    return "; ".join([*parts, _way_out(fit, metadata, option)])


def some_names(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many there are more."""
    return ", ".join(names[:most]) + f" and {len(names) - most:,} more" * (len(names) > most)


def _way_out(fit: _Fit, metadata: SourceMetadata, option: str) -> str:
    sizes = []
    for parameter, shape in fit.misshapen:
        name = parameter.name.removeprefix("text.")
        if len(shape) == len(parameter.shape):
            differing = [i for i, n in enumerate(shape) if n != parameter.shape[i]]
            sizes += [f"{_SIZES[name, i]} is {shape[i]}" for i in differing if (name, i) in _SIZES]
    if sizes:
        return f"there {', '.join(dict.fromkeys(sizes))}: {_other_model(metadata, option)}"
    if any(name.endswith(f".{known}") for name in fit.extra for known in fit.names):
        return "it holds more than one model: save the state dict of one alone"
    if [name.removeprefix(fit.prefix) for name in fit.extra] == ["logit_bias"]:
        return (
            "its logit_bias is that of a model trained with the sigmoid loss: train with "
            f"loss.kind=sigmoid, or give {option} a JSON file with init_logit_bias"
        )
    if fit.missing == ["logit_bias"] and not fit.extra:
        return (
            "the model has a logit_bias, as the sigmoid loss needs it, and the weights are of one "
            f"without: give {option} a JSON file without init_logit_bias"
        )
    return _other_model(metadata, option)


def _other_model(metadata: SourceMetadata, option: str) -> str:
    if metadata.architecture is None:
        return f"{option} has to name the model that they are of"
    return (
        f"{metadata.said_by} says that they are of {metadata.architecture.name}; leave {option} "
        "out to take what it says, or bring the file that belongs to it"
    )
