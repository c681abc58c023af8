"""How a source's tensors fit the parameters of an architecture, by their names and shapes.

The names of an OpenCLIP state dict are those of `parameter_table`. A source may have them behind a
prefix, with the parts that wrappers of torch put between, and with or without "text." before the
text tower's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.errors import InputError
from parallel_clip.model.parameters import Parameter

Shape = tuple[int, ...]
Part = Literal["vision", "text", "logits"]

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")
ALL_PARTS: frozenset[Part] = frozenset({"vision", "text", "logits"})
# The projections to features of all kinds of towers, by their names without "text.".
PROJECTIONS = frozenset(
    {
        "visual.proj",
        "visual.head.proj.weight",
        "visual.head.proj.bias",
        "visual.trunk.head.weight",
        "visual.trunk.head.bias",
        "text_projection",
        "text_projection.weight",
        "text_projection.bias",
    }
)
POSITIONS = frozenset(
    {"visual.positional_embedding", "visual.trunk.pos_embed", "positional_embedding"}
)

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


def part_of(name: str) -> Part:
    """The part of a model that a tensor is of, by its name in an OpenCLIP state dict."""
    if name in LOGIT_PARAMETERS:
        return "logits"
    return "vision" if name.startswith("visual.") else "text"


def parts_in_words(parts: Collection[Part]) -> str:
    words = {"vision": "vision tower", "text": "text tower", "logits": "logit parameters"}
    return " and ".join(words[part] for part in words if part in parts)


@dataclass
class TensorFit:
    """Where the parameters of a table are in a source.

    prefix: what stands before all names; names: stored names by global ones; shapes: as stored, by
    global names; missing, extra and misshapen: what does not fit; beside: projections, by global
    names, that the source has and the model has not, where it need not have the model's.
    """

    prefix: str
    names: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[tuple[Parameter, Shape]] = field(default_factory=list)
    beside: dict[str, Shape] = field(default_factory=dict)

    @property
    def problems(self) -> list:
        return [*self.missing, *self.extra, *self.misshapen]


def find_fit(
    shapes: Mapping[str, Shape],
    path: object,
    table: Sequence[Parameter],
    optional: Collection[str] = (),
    parts: Collection[Part] = ALL_PARTS,
    to_adapt: bool = False,
) -> TensorFit:
    """Find the parameters of some parts of a model among a source's tensors, and what does not fit.

    shapes: of the source's tensors; path: of the source, for messages; table: of the whole model;
    optional: names that may be missing; to_adapt: positions may be of another number, projections
    missing, of another shape, or of another kind: it is left to the caller to see to these.

    Raises:
        InputError: the source has two tensors of one name.
    """
    stored = without_wrappers(shapes, path)
    wanted = [p for p in table if part_of(p.name) in parts]
    fits = [
        _fit(stored, prefix, wanted, optional, parts, to_adapt)
        for prefix in _prefixes(stored, wanted)
    ]
    return min(fits, key=lambda fit: len(fit.problems))  # of several the shortest prefix


def without_wrappers(shapes: Mapping[str, Shape], path: object) -> dict[str, tuple[str, Shape]]:
    """The stored name and the shape of each tensor, by its name without the wrappers' parts.

    Raises:
        InputError: two tensors have one name then.
    """
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
    """What may stand before all names, shortest first: what does before any of the table's. The
    towers have names in common, so the name of one is no prefix."""
    found = {""}
    for name in (parameter.name for parameter in table):
        found |= {s.removesuffix(name) for s in stored if s.endswith(f".{name}")}
    return sorted((p for p in found if not p.endswith(("visual.", "text."))), key=len)


def _fit(
    stored: Mapping[str, tuple[str, Shape]],
    prefix: str,
    table: Sequence[Parameter],
    optional: Collection[str],
    parts: Collection[Part],
    to_adapt: bool,
) -> TensorFit:
    fit, used = TensorFit(prefix), set()
    for parameter in table:
        # OpenCLIP has two classes that differ in nothing but a "text." before the text tower's
        # names; either may be loaded into the other.
        name = parameter.name
        short = name.removeprefix("text.")
        twin = short if name != short else f"text.{name}"
        found = next((prefix + n for n in (name, twin) if prefix + n in stored), None)
        if found is None:
            if name not in optional and not (to_adapt and short in PROJECTIONS):
                fit.missing.append(name)
            continue
        used.add(found)
        fit.names[name], shape = stored[found]
        fit.shapes[name] = shape
        if shape != parameter.shape and not _may_differ(short, shape, parameter.shape, to_adapt):
            fit.misshapen.append((parameter, shape))
    no_parameters = {prefix + name for name in _NO_PARAMETERS}
    for found in sorted(stored.keys() - used - no_parameters):
        name = found.removeprefix(prefix)
        if part_of(name) not in parts:
            continue
        if to_adapt and name.removeprefix("text.") in PROJECTIONS:
            fit.beside[name] = stored[found][1]
        else:
            fit.extra.append(found)
    return fit


def _may_differ(name: str, stored: Shape, shape: Shape, to_adapt: bool) -> bool:
    """name: without "text."."""
    if name in LOGIT_PARAMETERS:
        return set(stored) <= {1}
    if not to_adapt or len(stored) != len(shape):
        return False
    is_other_number = stored[:-2] == shape[:-2] and stored[-1] == shape[-1]
    return name in PROJECTIONS or (name in POSITIONS and is_other_number)


# --------------------------------------------------------------------------------------- messages


def misfit(
    fit: TensorFit,
    shapes: Mapping[str, Shape],
    model: str,
    metadata: SourceMetadata,
    option: str,
) -> str:
    """What a file holds, what is missing and what is too much, and the way out.

    shapes: of its tensors; model: what they are not of; option: what names the model to the user.
    """
    count = len(shapes)
    held = f" ({some_names([*shapes])})" if shapes else ""
    parts = [
        f"the weights in {metadata.path} are not those of {model}",
        f"it holds {count:,} tensor{'s' * (count != 1)}{held}",
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


def _way_out(fit: TensorFit, metadata: SourceMetadata, option: str) -> str:
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
            f"without: train from them with init.from, or give {option} a JSON file without "
            "init_logit_bias"
        )
    return _other_model(metadata, option)


def _other_model(metadata: SourceMetadata, option: str) -> str:
    if metadata.architecture is None:
        return f"{option} has to name the model that they are of"
    return (
        f"{metadata.said_by} says that they are of {metadata.architecture.name}; leave {option} "
        "out to take what it says, or bring the file that belongs to it"
    )
