"""Which model a run trains: what the config names, and what its checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_clip.config import Config
from parallel_clip.convert.choose_model import ModelChoice, choose_model
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_initial_weights, open_source
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.compare import DROP_PATH, DROP_PATH_NAMES, differences
from parallel_clip.model.known_models import known_name, load_model
from parallel_clip.plan.resume import MODEL_FILE, ResumePoint

DEFAULT_MODEL = "ViT-L-14"


@dataclass(frozen=True)
class StartModel:
    """config: with `model.name` resolved; source: what the checkpoint that the run starts or
    resumes from says; preprocess: OpenCLIP's preprocess_cfg by what says it, lowest in rank first;
    notes: what to tell the user."""

    config: Config
    architecture: Architecture
    source: SourceMetadata | None
    preprocess: tuple[tuple[str, Mapping[str, Any] | None], ...]
    notes: tuple[str, ...] = ()


def find_start_model(config: Config, resume: ResumePoint) -> StartModel:
    """Resolve `model.name`, and see that the checkpoint to resume or to start from is of it.

    Raises:
        InputError: it is of another model, or is no checkpoint.
    """
    if resume.meta is not None and resume.meta.config is not None:
        return _of_own_run(config, resume)
    path, verify = resume.checkpoint, False  # all ranks verify it together, later
    if path is None:
        path, verify = config.init.from_, config.checkpoint.verify
    if path is None:
        config = _named(config, config.model.name or DEFAULT_MODEL)
        model = load_model(config.model.name, config.loss.kind)
        return StartModel(
            config, model.architecture, None, ((config.model.name, model.preprocess),)
        )
    opened = open_source(path, verify=verify)
    source = opened.metadata
    name = config.model.name or (DEFAULT_MODEL if source.architecture is None else None)
    choice = ModelChoice(
        name,
        config.model.override,
        "model.name",
        "model.override=",
        loss=config.loss.kind,
        tokenizer_chosen=config.data.tokenizer is not None,
    )
    architecture, preprocess = choose_model(choice, source)
    if resume.checkpoint is None:
        notes = open_initial_weights(opened, architecture).notes
    else:
        notes = ModelWeights(opened, architecture).notes
    if name is None:
        name = known_name(architecture, config.loss.kind)
    name = name or str(Path(config.run_dir) / MODEL_FILE)
    return StartModel(_named(config, name), architecture, source, preprocess, notes)


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


def _of_own_run(config: Config, resume: ResumePoint) -> StartModel:
    """Of a run that goes on: its own model, which a config that names one has to be the same as."""
    source = open_source(resume.checkpoint, verify=False).metadata
    settings = ((str(source.said_by), source.preprocess),)
    if config.model.name is None:
        config = _named(config, resume.meta.config["model"]["name"])
        return StartModel(config, source.architecture, source, settings)
    architecture = load_model(config.model.name, config.loss.kind).architecture
    if architecture != source.architecture:
        found = differences(source.architecture, architecture)
        differing = ", ".join(f"{d.key}: {d.one!r} → {d.other!r}" for d in found)
        raise InputError(
            f"the checkpoint {resume.checkpoint} is of another architecture "
            f"({source.architecture.name}) than model.name {config.model.name}"
            f"{f' ({differing})' if differing else ''}; set model.name to the checkpoint's model, "
            "or choose another run_dir"
        )
    return StartModel(config, architecture, source, settings)


def _named(config: Config, name: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
