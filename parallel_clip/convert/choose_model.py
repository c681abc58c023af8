"""Which model a source's weights are taken for, where the user may name one, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.data.samples.clean_text import text_cleaner
from parallel_clip.data.samples.saved_tokenizer import has_tokenizer
from parallel_clip.data.samples.tokenizer import check_tokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.compare import (
    DROP_PATH_NAMES,
    SIZES,
    check_override,
    differences,
    in_words,
)
from parallel_clip.model.known_models import NamedModel, load_model, with_logit_defaults
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.resize_model import with_sizes


@dataclass(frozen=True)
class ModelChoice:
    """What the user says of the model. name: as `model.name`, None for the source's own; override:
    the switches in which the two may differ, `name`'s winning; the options that say these, for
    messages; loss: whose logit parameters the model has; tokenizer_chosen: by another option, so
    that it does not matter which one either names; image_size and context_length: in place of
    those of `name`, or to be those of the source."""

    name: str | None = None
    override: Sequence[str] = ()
    name_option: str = "--model"
    override_option: str = "--override "
    loss: str = "infonce"
    tokenizer_chosen: bool = False
    image_size: int | Sequence[int] | None = None
    context_length: int | None = None

    @property
    def sizes(self) -> tuple[int | Sequence[int] | None, int | None]:
        return self.image_size, self.context_length


class ChosenModel(NamedTuple):
    """architecture; preprocess: OpenCLIP's preprocess_cfg by what says it, lowest in rank first."""

    architecture: Architecture
    preprocess: tuple[tuple[str, Mapping[str, Any] | None], ...]


def choose_model(choice: ModelChoice, source: SourceMetadata) -> ChosenModel:
    """The model that is named, else the source's own, with the preprocessing of both.

    Raises:
        InputError: neither says which model it is, or they differ in switches that are not
            overridden.
    """
    named, own = None, source.architecture
    if choice.name is not None:
        named = load_named(choice)
        check_override(choice.override, named.architecture, choice.override_option.rstrip(" ="))
    elif own is None:
        raise InputError(
            f"{source.path} does not say which model it is of: it has no open_clip_config.json "
            f"beside it; add {choice.name_option} NAME"
        )
    elif of_features := [name for name in choice.override if name not in DROP_PATH_NAMES]:
        raise InputError(
            f"{choice.override_option}{','.join(of_features)} is for a {choice.name_option} "
            "that differs from the checkpoint's own model; name one, or leave it out"
        )
    wanted = named.architecture if named is not None else with_sizes(own, *choice.sizes)
    if own is not None:
        _check_same_model(choice, wanted, source)
    architecture = wanted if named is not None else with_logit_parameters(own, choice.loss)
    return ChosenModel(
        architecture,
        (
            (choice.name or "", named.preprocess if named else None),
            (str(source.preprocess_from or source.said_by), source.preprocess),
        ),
    )


def load_named(choice: ModelChoice) -> NamedModel:
    """The model that is named, at the sizes that are wanted."""
    named = load_model(choice.name, choice.loss)
    return named._replace(architecture=with_sizes(named.architecture, *choice.sizes))


def with_logit_parameters(architecture: Architecture, loss: str) -> Architecture:
    """The same model with the logit parameters that a loss needs."""
    return architecture_from_json(with_logit_defaults(architecture.json, loss), architecture.name)


def _check_same_model(choice: ModelChoice, named: Architecture, source: SourceMetadata) -> None:
    own = source.architecture
    override = [*choice.override, *["hf_tokenizer_name"] * choice.tokenizer_chosen]
    differing = [d for d in differences(own, named) if not d.is_named(override)]
    if not differing:
        return
    what, left_out = "what image size and context length make of it", "them"
    if choice.name is not None:
        what, left_out = f"{choice.name_option} {choice.name}", choice.name_option
    way_out = f"Leave {left_out} out to take the checkpoint's own"
    if all(d.key in SIZES for d in differing):
        way_out += "; a run that begins with init.from may have another size"
    if _shapes(own) == _shapes(named):
        keys = ",".join(d.key for d in differing)
        keys = f"[{keys}]" if choice.override_option.endswith("=") else keys
        way_out += f"; where the difference is meant, {choice.override_option}{keys} says so"
    raise InputError(
        f"{what} is another model than {source.said_by} says: {in_words(differing)}. {way_out}"
    )


def check_mixed_model(
    choice: ModelChoice, architecture: Architecture, source: SourceMetadata, other: SourceMetadata
) -> None:
    """See that `other`, whose weights are to be averaged with those of `source`, is of its model.

    Raises:
        InputError: what it says of its model differs in a switch that is not overridden.
    """
    if other.architecture is None:
        return
    found = differences(other.architecture, architecture)
    differing = [d for d in found if not d.is_named(choice.override)]
    if differing:
        shown = ", ".join(f"{d.key} is {d.one!r} there and {d.other!r} here" for d in differing)
        raise InputError(
            f"--mix: {other.said_by} says another model than {choice.name or source.said_by}: "
            f"{shown}. Only weights of one model can be averaged"
        )


def _shapes(architecture: Architecture) -> set[tuple[str, tuple[int, ...]]]:
    """What weights have to fit, but for the bias of the logits."""
    table = parameter_table(architecture)
    return {(p.name.removeprefix("text."), p.shape) for p in table if p.name != "logit_bias"}


def resolve_preprocess(
    image_size: tuple[int, int], settings: Sequence[tuple[str, Mapping[str, Any] | None]]
) -> tuple[Preprocess, str]:
    """The preprocessing of settings by what says them, the last first in rank; and in words what is
    used and where that is from."""
    given = [
        (where, said)
        for where, said in settings
        if said is not None and any(value is not None for value in said.values())
    ]
    where = ", overruled by ".join(where for where, _ in given) or "OpenCLIP's defaults"
    try:
        preprocess = Preprocess.from_openclip(image_size, *(said for _, said in given))
    except InputError as error:
        raise InputError(f"{error} (from {where})") from None
    return preprocess, f"{preprocess} (from {where})"


def tokenizer_files(source: SourceMetadata, architecture: Architecture) -> TokenizerFiles:
    """The tokenizer that a source's model takes, as far as its files are at hand.

    Raises:
        InputError: they are damaged, or texts are to be cleaned in a way that there is not.
    """
    named = architecture.text.tokenizer
    if "clean" in architecture.text.tokenizer_kwargs:
        text_cleaner(architecture.text.tokenizer_kwargs["clean"])
    if source.tokenizer == "openclip" or (source.tokenizer is None and named is None):
        return TokenizerFiles()
    path = Path(source.tokenizer) if source.tokenizer else source.folder
    if not has_tokenizer(path):
        return TokenizerFiles(named or path.name)
    check_tokenizer(path)
    return TokenizerFiles.read(path, named)
