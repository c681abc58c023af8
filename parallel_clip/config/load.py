"""Read a config file with its overrides and check it; every error names the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from parallel_clip.config import file as config_file
from parallel_clip.config.blends import check_blends, training_sources
from parallel_clip.config.keys import Config, Optimizer, parse_bytes, parse_seconds
from parallel_clip.config.phases import check_phases
from parallel_clip.config.resume import check_allowed
from parallel_clip.config.schema import describe_type, fields_of, keys_of, section_of, show
from parallel_clip.errors import InputError
from parallel_clip.layout import check_virtual_pipeline


def nearest_key(path: str, model: type[BaseModel]) -> str:
    """The known key or section most like `path`; a known name in the wrong section is found."""
    leaf = path.rpartition(".")[2]
    keys = [key for key, _ in keys_of(model)]
    sections = [key.partition(".")[0] for key in keys if "." in key]
    is_in_list = any(part.isdigit() for part in path.split("."))

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, path, known).ratio()
        last = difflib.SequenceMatcher(None, leaf, known.rpartition(".")[2]).ratio()
        return whole + last - 0.1 * (".0." in known and not is_in_list)

    return max(dict.fromkeys(keys + sections), key=likeness)


def problems_in(error: ValidationError, model: type[BaseModel], tree: Any) -> list[str]:
    """Pydantic's errors about `tree`, one plain sentence a key, in the order of the keys."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, field, value = _locate(detail["loc"], model, tree)
        if isinstance(value, dict) and detail["type"] == "literal_error":
            continue  # of a word or a section: a section was meant, which has errors of its own
        if field is None:
            problem = f"unknown key {path}; did you mean {nearest_key(path, model)}?"
        elif detail["type"] == "missing":
            problem = f"{path} is missing; expected {describe_type(field)}"
        else:
            problem = f"{path} is {show(value)}; expected {describe_type(field)}"
        problems.setdefault(path, problem)  # each member of a union reports by itself
    return list(problems.values())


def _locate(
    location: tuple[int | str, ...], model: type[BaseModel], tree: Any
) -> tuple[str, FieldInfo | None, Any]:
    """The key that an error is about: its dotted path, its field (None: unknown), its value."""
    section: type[BaseModel] | None = model
    field, path, trail = None, "", []
    value, below = None, tree
    for step in location:
        if section is None:  # inside a leaf: a place in a list, or which member of a union failed
            break
        trail.append(str(step))
        if isinstance(step, int) and isinstance(below, list):
            below = below[step]
            continue
        if step == section.__name__ or str(step).startswith("literal["):
            trail.pop()  # which member of a union failed
            continue
        field = fields_of(section).get(step)
        path = ".".join(trail)
        if field is None:
            return path, None, None
        value = below = below.get(step)
        section, _ = section_of(field.annotation)
    return path, field, value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, lay the `key=value` overrides over it, and check it.

    Raises:
        InputError: with every problem that was found.
    """
    return config_from_dict(config_file.read_tree(path, overrides))


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Check `tree`, keys by their YAML names, and fill in the defaults.

    Raises:
        InputError: with every problem that was found.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = problems_in(error, Config, tree)
    else:
        problems = list(check_consistency(config))
        if not problems:
            return config
    if len(problems) == 1:
        raise InputError(problems[0])
    raise InputError("\n- ".join([f"the config has {len(problems)} problems:", *problems]))


def check_consistency(config: Config) -> Iterator[str]:
    """What is wrong between keys that are each right by themselves."""
    lengths = config.train.model_dump(include={"steps", "samples", "epochs"}, exclude_none=True)
    if len(lengths) != 1:
        given = " and ".join(f"train.{key}" for key in lengths) or "none"
        yield f"give exactly one of train.steps, train.samples and train.epochs; given: {given}"
    yield from check_blends(config)
    init = config.init
    if init.projection == "new" and (init.from_, init.vision, init.text) == (None, None, None):
        yield (
            "init.projection new is for weights of init.from, init.vision or init.text, and none "
            "of these is given; leave it out"
        )
    if init.logit_bias is not None and config.loss.kind == "infonce":
        yield (
            f"init.logit_bias {init.logit_bias} is for loss.kind sigmoid: InfoNCE does not change "
            "where all logits do alike, and its model has no bias; leave it out"
        )
    if config.loss.label_smoothing and config.loss.kind == "sigmoid":
        yield (
            f"loss.label_smoothing {config.loss.label_smoothing:g} is for loss.kind infonce: the "
            "sigmoid loss has a target for each logit, nearly all of them 0, and no distribution "
            "to smooth; leave it out"
        )
    parallel, schedule, evaluate = config.parallel, config.schedule, config.evaluate
    yield from _complaint_of(check_virtual_pipeline, parallel.pipeline, parallel.virtual_pipeline)
    if parallel.memory is not None:
        yield from _complaint_of(parse_bytes, parallel.memory)
    yield from _complaint_of(parse_bytes, config.data.cache, "data.cache")
    yield from _useless_caption_lines(config)
    yield from _one_caption_alone(config)
    if config.train.time_limit is not None:
        yield from _complaint_of(parse_seconds, config.train.time_limit, "train.time_limit")
    yield from check_allowed(config.resume.allow)
    if schedule.cooldown and schedule.kind != "wsd":
        yield f"schedule.cooldown is for schedule.kind wsd, not {schedule.kind}; leave it out"
    if schedule.min_lr and schedule.kind == "constant":
        yield "schedule.min_lr is for schedule.kind cosine and wsd, not constant; leave it out"
    if schedule.min_lr > config.optimizer.lr:
        yield f"schedule.min_lr {schedule.min_lr:g} is above optimizer.lr {config.optimizer.lr:g}"
    yield from check_phases(config)
    yield from _rates_of_no_schedule(config.optimizer)
    yield from _rates_of_what_is_locked(config)
    steps = config.train.steps
    if schedule.kind == "wsd" and steps and schedule.warmup + schedule.cooldown > steps:
        yield (
            f"schedule.warmup {schedule.warmup} + schedule.cooldown {schedule.cooldown} are more "
            f"than train.steps {steps}; shorten one, or train longer"
        )
    if config.ema.decay is None and config.ema.every != 1:
        yield f"ema.every {config.ema.every} is for an average of the weights; give ema.decay, too"
    if config.ema.decay is None and evaluate.ema:
        yield "evaluate.ema is for an average of the weights, and there is none; give ema.decay"
    if evaluate.every and not (evaluate.loss or evaluate.retrieval or evaluate.zero_shot):
        yield (
            f"evaluate.every {evaluate.every} has nothing to evaluate; give evaluate.loss, "
            "evaluate.retrieval or evaluate.zero_shot, or set evaluate.every to 0"
        )


def _rates_of_no_schedule(settings: Optimizer) -> Iterator[str]:
    """Where there is no `optimizer.lr` whose schedule the other learning rates could follow."""
    given = settings.model_dump(include={"lr_vision", "lr_text", "lr_logit"}, exclude_none=True)
    if settings.lr == 0 and given:
        shown = ", ".join(f"optimizer.{key} {value:g}" for key, value in given.items())
        yield (
            f"optimizer.lr is 0, and {shown} would be parts of its schedule; set optimizer.lr "
            "to the largest of them, and to 0 the one of what is to stay as it is"
        )


def _rates_of_what_is_locked(config: Config) -> Iterator[str]:
    """Learning rates of towers that are not trained at all."""
    settings, freeze = config.optimizer, config.freeze
    locked = [tower for tower in ("vision", "text") if getattr(freeze, tower) == "all"]
    decay = settings.layer_decay
    decays = decay if isinstance(decay, dict) else {}
    for tower in locked:
        for key, value in (
            (f"lr_{tower}", getattr(settings, f"lr_{tower}")),
            (f"layer_decay.{tower}", decays.get(tower)),
        ):
            if value is not None:
                yield (
                    f"optimizer.{key} {value:g} is for a tower that freeze.{tower} all does not "
                    "train; leave one of both out"
                )
    if isinstance(decay, float | int) and len(locked) == 2:
        yield f"optimizer.layer_decay {decay:g} is for towers, and both are frozen; leave it out"


def _useless_caption_lines(config: Config) -> Iterator[str]:
    """Where lines of a `.txt` are asked for, and captions are taken from the `.json`."""
    settings, found = config.data, training_sources(config)
    from_json = [
        (settings.caption_key, source.caption_key) != (None, None) for source in found.sources
    ]
    wrong = ["data"] if settings.caption_lines and from_json and all(from_json) else []
    for key, source, is_json in zip(found.keys, found.sources, from_json, strict=True):
        if source.caption_lines and is_json:
            wrong.append(key)
    for key in wrong:
        yield (
            f"{key}.caption_lines is for captions in .txt, and caption_key takes them from .json; "
            "leave one of both out"
        )


def _one_caption_alone(config: Config) -> Iterator[str]:
    """Where several captions a picture are asked for, and no source can have several."""
    settings, sources = config.data, training_sources(config).sources
    several = any(
        source.caption_key is not None
        or (settings.caption_lines if source.caption_lines is None else source.caption_lines)
        for source in sources
    )
    count = settings.captions_per_image
    if count > 1 and sources and settings.caption_key is None and not several:
        yield (
            f"data.captions_per_image {count} is for samples with several captions, and the whole "
            ".txt is one; set data.caption_lines to true where each line is a caption, or "
            "data.caption_key to a key of the .json that holds a list of them, or several keys"
        )


def _complaint_of(check: Callable[..., object], *arguments: Any) -> Iterator[str]:
    """The message of the InputError that a check raises, if it raises one."""
    try:
        check(*arguments)
    except InputError as error:
        yield str(error)
