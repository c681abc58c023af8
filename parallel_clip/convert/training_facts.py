"""What one of our checkpoints knows of its training, as lines that a reader understands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_clip.checkpoint.commit import CHECKPOINTS, EVALUATIONS_FILE
from parallel_clip.checkpoint.inspect import layout_words
from parallel_clip.checkpoint.meta import Meta

# Name, or name and password, before an address's host: the latter may have slashes, as S3's do.
_LOGIN = re.compile(r"^(?:[^/@]*:.*|[^/@]*)@")


@dataclass(frozen=True)
class TrainingFacts:
    """rows: (what, value); figures: (what, value) of an evaluation at the checkpoint's step."""

    rows: tuple[tuple[str, str], ...]
    figures: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class MixedFacts:
    """One of the checkpoints of which a model is the mean: what it is called, its share, from 0 to
    1, and what is known of its training."""

    name: str
    share: float
    training: TrainingFacts | None


def read_training_facts(folder: Path, meta: Meta, averages: bool = False) -> TrainingFacts | None:
    """The facts of a checkpoint folder, and of the run folder that it lies in; None where none was
    trained. averages: of the averages of its weights."""
    if meta.step == 0:
        return None
    results = {}
    if folder.parent.name == CHECKPOINTS:
        log = folder.parent.parent / EVALUATIONS_FILE
        results = _read_evaluation(log, meta.step, averages)
    rows = tuple(_rows(meta))
    if averages:
        rows += (("weights", _average_words((meta.config or {})["ema"])),)
    return TrainingFacts(rows, tuple(_figures(results)))


def _rows(meta: Meta) -> Iterator[tuple[str, str]]:
    config = meta.config or {}
    yield "optimizer steps", f"{meta.step:,}"
    if meta.position:
        yield "pairs seen", f"{meta.position:,}"
    yield from _data_rows(meta, config)
    if meta.bad_samples:
        yield "pairs replaced, as they could not be read", f"{meta.bad_samples:,}"
    if "loss" in config:
        kinds = {"infonce": "InfoNCE (softmax over the batch)", "sigmoid": "sigmoid, pair by pair"}
        yield "loss", kinds.get(config["loss"]["kind"], config["loss"]["kind"])
    if "batch" in config:
        yield "batch", f"{config['batch']['global']:,} pairs"
    if "optimizer" in config:
        yield "optimizer", _optimizer_words(config["optimizer"])
    if "schedule" in config:
        schedule = config["schedule"]
        yield "learning rate", f"{schedule['kind']}, {schedule['warmup']:,} steps of warmup"
    if "precision" in config:
        yield "precision of training", f"{config['precision']}, with fp32 master weights"
    if config.get("init", {}).get("from"):
        yield "weights began from", short_path(config["init"]["from"])
    for phase in config.get("phases") or ():
        yield "phase", _phase_words(phase)
    for tower, how in (config.get("freeze") or {}).items():
        if how is not None:
            yield f"not trained, of the {tower} tower", _frozen_words(how)
    if "seed" in config:
        yield "seed", str(config["seed"])
    if meta.layout:
        words = layout_words(meta.layout)
        yield "layout", f"{words} processes (data × tensor × pipeline)"
    if meta.versions:
        yield "versions", ", ".join(f"{name} {v}" for name, v in meta.versions.items() if v)


def _data_rows(meta: Meta, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A row a source, in the order in which sources are numbered."""
    counted = (meta.data or {}).get("sources", [])
    named = [source["shards"] for source in config.get("data", {}).get("train", [])]
    for number, shards in enumerate((meta.data or {}).get("shards", named)):
        words = [_shard_words(shards)]
        if number < len(counted):
            counts = counted[number]
            words.append(f"{counts['shards']:,} shards, {counts['samples']:,} pairs")
        if number < len(meta.source_samples):
            words.append(f"{meta.source_samples[number]:,} seen")
        yield "training data", "; ".join(words)


def _shard_words(shards: str | list[str]) -> str:
    return f"`{', '.join(map(short_path, [shards] if isinstance(shards, str) else shards))}`"


def _optimizer_words(optimizer: Mapping[str, Any]) -> str:
    betas = ", ".join(f"{beta:g}" for beta in optimizer["betas"])
    words = (
        f"AdamW, learning rate {optimizer['lr']:g}, betas {betas}, eps {optimizer['eps']:g}, "
        f"weight decay {optimizer['weight_decay']:g}"
    )
    clip = optimizer["clip_grad_norm"]
    return f"{words}, gradient norm clipped to {clip:g}" if clip else words


def _frozen_words(how: str | dict[str, Any]) -> str:
    if how == "all":
        return "all"
    norms = " and all LayerNorms" if how["norms"] else ""
    until = how.get("unfreeze_at")
    thawed = "" if until is None else f", until {_until_words(until)}"
    return f"all but the last {how['unlocked_groups']} of its layer groups{norms}{thawed}"


def _phase_words(phase: Mapping[str, Any]) -> str:
    size = phase["resolution"]
    words = [] if size is None else [f"resolution {size}"]
    for key, name in (("patch_dropout", "patch dropout"), ("lr", "learning rate")):
        if phase[key] is not None:
            words.append(f"{name} {phase[key]:g}")
    sources = phase.get("sources") or ()
    words += [f"{_shard_words(source['shards'])} × {source['weight']:g}" for source in sources]
    until = "to the end" if phase["until"] is None else f"until {_until_words(phase['until'])}"
    return f"{until}: {', '.join(words) or 'as the model'}"


def _until_words(until: str | int) -> str:
    return f"{until:,} pairs" if isinstance(until, int) else f"{until} of the steps"


def _average_words(ema: Mapping[str, Any]) -> str:
    every = f", {ema['every']:,} optimizer steps apart" if ema["every"] > 1 else ""
    return f"exponential moving average of decay {ema['decay']:g}{every}"


def short_path(path: str) -> str:
    """The last two parts of a path or an address, without what may sign the latter or log in: the
    rest says where it lies, which is nobody's business once it is published."""
    _, is_address, rest = path.partition("://")
    path = _LOGIN.sub("", rest) if is_address else path
    return "/".join(path.partition("?")[0].partition("#")[0].rstrip("/").split("/")[-2:])


def _read_evaluation(file: Path, step: int, averages: bool) -> Mapping[str, Any]:
    """The last evaluation of a step, of the weights or of their averages; empty where there is
    none."""
    found: Mapping[str, Any] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a crash, or damaged
            continue
        if not isinstance(values, Mapping) or values.get("step") != step:
            continue
        if values.get("ema", False) == averages:
            found = values
    return found


def _figures(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _figures(value, f"{words}: ")
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield words, value
