"""The checkpoints of `init.*`: which parts of the model come from each, and whether its towers are
those of the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from parallel_clip.convert.open import open_source
from parallel_clip.convert.tensor_fit import ALL_PARTS, POSITIONS, PROJECTIONS, Part, part_of
from parallel_clip.convert.weight_source import SourceMetadata, WeightSource
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.compare import SIZES, Difference, Tower, in_words, tower_differences

# Which projections a source has is seen by their names and shapes.
_PROJECTION_KEYS = frozenset(
    {
        "vision_cfg.timm_proj",
        "vision_cfg.timm_proj_bias",
        "text_cfg.proj_type",
        "text_cfg.proj_bias",
    }
)
_PATCHES = (
    "Patches of another size are not resampled: the convolution over them would have to be trained "
    "anew. "
)


@dataclass(frozen=True)
class InitialSource:
    """key and path: as the config has it; parts: of the model that come from it."""

    key: str
    path: str
    parts: frozenset[Part]
    source: WeightSource

    @property
    def metadata(self) -> SourceMetadata:
        return self.source.metadata

    @property
    def towers(self) -> list[Tower]:
        return [tower for tower in ("vision", "text") if tower in self.parts]


def open_initial_sources(
    whole: str | None, vision: str | None, text: str | None, *, verify: bool
) -> list[InitialSource]:
    """Open `init.from`, `init.vision` and `init.text`, each None where it is not given. From
    `init.from` comes what the others do not have.

    verify: hash all files of checkpoints of ours first.

    Raises:
        InputError: as `open_source`.
    """
    named = [("init.vision", vision, "vision"), ("init.text", text, "text")]
    wanted = [(key, path, frozenset({part})) for key, path, part in named if path is not None]
    if whole is not None:
        rest = ALL_PARTS.difference(*(parts for _, _, parts in wanted))
        wanted.insert(0, ("init.from", whole, rest))
    opened = {path: open_source(path, verify=verify) for _, path, _ in wanted}
    return [InitialSource(key, path, parts, opened[path]) for key, path, parts in wanted]


def check_towers(
    initial: InitialSource, architecture: Architecture, model: str, override: Collection[str]
) -> None:
    """See that a source's towers, where it says of which model they are, give the features of those
    of the model. Sizes and projections may differ.

    model: what says which model it is, such as "model.name ViT-L-14"; override: switches in which
    they may differ, too.

    Raises:
        InputError: switches differ, which are listed.
    """
    own = initial.metadata.architecture
    if own is None:
        return
    differing = [
        d
        for d in tower_differences(own, architecture, initial.towers)
        if d.key not in SIZES | _PROJECTION_KEYS and not d.is_named(override)
    ]
    if not differing:
        return
    whole = initial.parts == ALL_PARTS
    what = "is another model" if whole else f"has another {' and '.join(initial.towers)} tower"
    reason = _PATCHES if any(d.key == "vision_cfg.patch_size" for d in differing) else ""
    raise InputError(
        f"{model} {what} than {initial.metadata.said_by} ({initial.key}) says: "
        f"{in_words(differing)}. {reason}{_way_out(initial, own, architecture, differing)}"
    )


def _way_out(
    initial: InitialSource,
    own: Architecture,
    architecture: Architecture,
    differing: Collection[Difference],
) -> str:
    way_out = f"Name the checkpoint of such a tower as {initial.key}, or a model that has this one"
    if initial.parts == ALL_PARTS:
        way_out = (
            "Leave model.name out to take the checkpoint's own (model.image_size and "
            "model.context_length change its sizes)"
        )
    if _shapes(own, initial.parts) == _shapes(architecture, initial.parts):
        keys = ",".join(d.key for d in differing)
        way_out += f"; where the difference is meant, model.override=[{keys}] says so"
    return way_out


def _shapes(
    architecture: Architecture, parts: Collection[Part]
) -> set[tuple[str, tuple[int, ...]]]:
    """What the weights of some parts have to fit."""
    named = ((p.name.removeprefix("text."), p) for p in parameter_table(architecture))
    return {
        (short, p.shape)
        for short, p in named
        if part_of(p.name) in parts - {"logits"} and short not in PROJECTIONS | POSITIONS
    }
