"""Which model a run trains, and from which weights: what the config names, and what its checkpoints
say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from parallel_clip.config import Config
from parallel_clip.convert.choose_model import (
    ModelChoice,
    choose_model,
    load_named,
    with_logit_parameters,
)
from parallel_clip.convert.initial_sources import InitialSource, check_towers, open_initial_sources
from parallel_clip.convert.initial_weights import InitialWeights, find_initial_weights
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_source
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.compare import (
    DROP_PATH,
    DROP_PATH_NAMES,
    check_override,
    differences,
)
from parallel_clip.model.known_models import known_name, load_model
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.resize_model import with_sizes
from parallel_clip.plan.logit_start import LogitStart, find_logit_start
from parallel_clip.plan.phase_models import phase_models
from parallel_clip.plan.resume import MODEL_FILE, ResumePoint

DEFAULT_MODEL = "ViT-L-14"

Settings = tuple[tuple[str, Mapping[str, Any] | None], ...]


@dataclass(frozen=True)
class StartModel:
    """config: with `model.name` resolved; architecture: of the config, which phases change;
    tokenizer_from: the checkpoint that says which tokenizer
    the model takes; preprocess: OpenCLIP's preprocess_cfg by what says it, lowest in rank first;
    initial: None where a run goes on, or begins at random; notes: what to tell the user; logits: in
    place of what the weights have."""

    config: Config
    architecture: Architecture
    tokenizer_from: SourceMetadata | None
    preprocess: Settings
    initial: InitialWeights | None = None
    notes: tuple[str, ...] = ()
    logits: LogitStart = LogitStart()


def find_start_model(config: Config, resume: ResumePoint) -> StartModel:
    """Resolve `model.name`, and see that what the run resumes or starts from is of it.

    Raises:
        InputError: it is of another model, or is no checkpoint.
    """
    if resume.checkpoint is None:
        return _of_new_run(config)
    if resume.meta.config is None:
        return _of_converted_run(config, resume)
    return _of_own_run(config, resume)


def check_trainable(architecture: Architecture, override: Sequence[str]) -> None:
    """See that all that the model does in training alone is built here.

    Raises:
        InputError: it has stochastic depth, and `model.override` does not say to train without.
    """
    rate = getattr(architecture.vision, "drop_path", 0)
    if rate and DROP_PATH_NAMES.isdisjoint(override):
        raise InputError(
            f"{architecture.name} is trained with {DROP_PATH} {rate:g} (stochastic depth), which "
            "is not built here; model.override=[timm_drop_path] trains it without"
        )


# -------------------------------------------------------------------------------- a run that begins


class _Base(NamedTuple):
    """The model before its sizes are changed: what `model.name` would be (None: it is not known by
    a name), what says so, for messages, and its preprocessing."""

    name: str | None
    said_by: str
    architecture: Architecture
    preprocess: Mapping[str, Any] | None


def _of_new_run(config: Config) -> StartModel:
    init, model = config.init, config.model
    sources = open_initial_sources(
        init.from_, init.vision, init.text, verify=config.checkpoint.verify
    )
    base = _base_model(config, sources)
    architecture = _resized(base, config)
    _check_override(config, base, sources)
    chosen = ["hf_tokenizer_name"] if config.data.tokenizer is not None else []
    for source in sources:
        check_towers(source, architecture, base.said_by, [*model.override, *chosen])
    by_tower = {tower: source for source in sources for tower in source.towers}
    vision, text = by_tower.get("vision"), by_tower.get("text")
    initial, notes = None, []
    if sources:
        first = phase_models(config, architecture)[0]
        initial, notes = find_initial_weights(sources, first, base.architecture, init.projection)
    if init.text is not None and config.data.tokenizer is None:
        notes.append(f"tokenizer: as init.text {init.text} has it")
    preprocess: Settings = ((base.name or "", base.preprocess),)
    if vision is not None:
        said = vision.metadata
        preprocess += ((str(said.preprocess_from or said.said_by), said.preprocess),)
    name = base.name or known_name(architecture, config.loss.kind)
    return StartModel(
        _named(config, name or str(Path(config.run_dir) / MODEL_FILE)),
        architecture,
        text.metadata if text is not None else None,
        preprocess,
        initial,
        tuple(notes),
        find_logit_start(init, initial is not None and initial.lacks_bias),
    )


def _base_model(config: Config, sources: Sequence[InitialSource]) -> _Base:
    """By `model.name`, else by `init.from`, else by both towers' checkpoints where these agree."""
    name, loss, own = config.model.name, config.loss.kind, None
    whole = next((source for source in sources if source.key == "init.from"), None)
    if name is None and whole is not None:
        own, said_by = whole.metadata.architecture, f"the model of init.from {whole.path}"
    elif name is None and sources:
        own, said_by = _common_model(sources), "the model of init.vision and init.text"
    if own is not None:
        return _Base(None, said_by, with_logit_parameters(own, loss), None)
    name = name or DEFAULT_MODEL
    named = load_model(name, loss)
    return _Base(name, f"model.name {name}", named.architecture, named.preprocess)


def _common_model(sources: Sequence[InitialSource]) -> Architecture:
    own = [source.metadata.architecture for source in sources]
    if len(own) == 2 and None not in own and not differences(*own):
        return own[0]
    said = (
        f"{source.key} {source.path} "
        + (f"is of {model.name}" if model is not None else "does not say of which it is")
        for source, model in zip(sources, own, strict=True)
    )
    raise InputError(
        f"model.name has to name the model that is trained ({', '.join(said)}); it may be left out "
        "where both towers are of one and the same model, or init.from is given"
    )


def _resized(base: _Base, config: Config) -> Architecture:
    """At the sizes of the config; where it is known by a name then, called by that."""
    sizes = config.model.image_size, config.model.context_length
    if sizes == (None, None):
        return base.architecture
    architecture = with_sizes(base.architecture, *sizes)
    name = known_name(architecture, config.loss.kind)
    return replace(architecture, name=name or architecture.name)


def _check_override(config: Config, base: _Base, sources: Sequence[InitialSource]) -> None:
    override = config.model.override
    check_override(override, base.architecture, "model.override")
    of_features = [name for name in override if name not in DROP_PATH_NAMES]
    if of_features and base.name is None and [source.key for source in sources] == ["init.from"]:
        raise InputError(
            f"model.override={','.join(of_features)} is for a model.name that differs from the "
            "checkpoint's own model; name one, or leave it out"
        )


# ------------------------------------------------------------------------------ a run that goes on


def _choice(config: Config, name: str | None) -> ModelChoice:
    return ModelChoice(
        name,
        config.model.override,
        "model.name",
        "model.override=",
        loss=config.loss.kind,
        tokenizer_chosen=config.data.tokenizer is not None,
        image_size=config.model.image_size,
        context_length=config.model.context_length,
    )


def _of_converted_run(config: Config, resume: ResumePoint) -> StartModel:
    """Of a run folder that `convert` wrote, with a model and no config."""
    init = config.init
    given = {"init.from": init.from_, "init.vision": init.vision, "init.text": init.text}
    given |= {"init.logit_scale": init.logit_scale, "init.logit_bias": init.logit_bias}
    keys = [key for key, value in given.items() if value is not None]
    if keys:
        raise InputError(
            f"{config.run_dir} holds a converted checkpoint to train, and {' and '.join(keys)} "
            "would begin with other weights; leave one of both out, or choose another run_dir, "
            f"with init.from={config.run_dir} where its weights are meant"
        )
    opened = open_source(resume.checkpoint, verify=False)  # all ranks verify it together, later
    name = config.model.name
    architecture, preprocess = choose_model(_choice(config, name), opened.metadata)
    notes = ModelWeights(opened, architecture).notes
    name = name or known_name(architecture, config.loss.kind)
    name = name or str(Path(config.run_dir) / MODEL_FILE)
    return StartModel(_named(config, name), architecture, opened.metadata, preprocess, notes=notes)


def _of_own_run(config: Config, resume: ResumePoint) -> StartModel:
    """Of a run that goes on: its own model, which a config that names one has to be the same as.
    What phases change of it is not looked at: a checkpoint is loaded into the model of any."""
    source = open_source(resume.checkpoint, verify=False).metadata
    own = source.architecture
    if resume.meta.run_model is not None:
        own = architecture_from_json(resume.meta.run_model, resume.meta.model_name)
    settings = ((str(source.said_by), source.preprocess),)
    if config.model.name is None:
        saved = resume.meta.config["model"]
        kept = {key: saved.get(key) for key in ("name", "image_size", "context_length")}
        model = config.model.model_copy(update=kept)
        config = config.model_copy(update={"model": model})
        return StartModel(config, own, source, settings)
    architecture = load_named(_choice(config, config.model.name)).architecture
    if architecture != own:
        found = differences(own, architecture)
        differing = ", ".join(f"{d.key}: {d.one!r} → {d.other!r}" for d in found)
        raise InputError(
            f"the checkpoint {resume.checkpoint} is of another architecture "
            f"({own.name}) than model.name {config.model.name}"
            f"{f' ({differing})' if differing else ''}; set model.name to the checkpoint's model, "
            "or choose another run_dir"
        )
    return StartModel(config, architecture, source, settings)


def _named(config: Config, name: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
