"""Open a checkpoint of any format, and convert it to another."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import META_FILE
from parallel_clip.convert.choose_model import (
    ModelChoice,
    check_mixed_model,
    choose_model,
    resolve_preprocess,
    tokenizer_files,
)
from parallel_clip.convert.huggingface import (
    HUGGING_FACE_CONFIG,
    HuggingFaceSource,
    is_huggingface_folder,
    write_huggingface,
)
from parallel_clip.convert.huggingface_config_writer import is_siglip
from parallel_clip.convert.huggingface_names import has_huggingface_names
from parallel_clip.convert.huggingface_tokenizer_files import huggingface_tokenizer
from parallel_clip.convert.mix import MixedPart, MixedSource, read_shares
from parallel_clip.convert.model_card import check_license, model_card
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.native import CheckpointSource, write_run
from parallel_clip.convert.openclip import (
    OpenClipSource,
    find_openclip_file,
    is_openclip_folder,
    write_openclip,
)
from parallel_clip.convert.openclip_optimizer import read_adamw
from parallel_clip.convert.target_folder import check_target
from parallel_clip.convert.target_notes import target_notes
from parallel_clip.convert.weight_source import WeightSource
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture


def open_source(path: str | Path, *, verify: bool = True, averages: bool = False) -> WeightSource:
    """Open a run folder (its latest checkpoint), a checkpoint folder, a file or folder of
    OpenCLIP's or of Hugging Face's (CLIPModel, SiglipModel), or a file of OpenAI's.

    verify: hash all files of a checkpoint of ours before anything is taken from it; averages: take
    the averages of its weights (`ema.decay`).

    Raises:
        InputError: it is none of these, is not whole, or has no averages.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise InputError(
            f"checkpoint {path} does not exist (paths start from {Path.cwd()}); give a run folder, "
            "a checkpoint folder, or a file or folder of OpenCLIP's or Hugging Face's"
        )
    folder = None
    if path.is_dir():
        folder = commit.latest(path) or (path if (path / META_FILE).is_file() else None)
    if folder is not None:
        return CheckpointSource(folder, verify, averages)
    if averages:
        raise InputError(
            f"{path} has no averages of weights: only runs with ema.decay, and their checkpoints, "
            "have them; leave --ema out"
        )
    if not path.is_dir():
        return _open_file(path)
    if is_huggingface_folder(path) and not is_openclip_folder(path):
        return HuggingFaceSource(path)
    file, notes = find_openclip_file(path)
    if file is None:
        raise InputError(
            f"{path} holds no checkpoint: expected a run folder (checkpoints/latest), a checkpoint "
            f"folder ({META_FILE}), OpenCLIP's weights (open_clip_model.safetensors), or a "
            f"folder of Hugging Face's ({HUGGING_FACE_CONFIG})"
        )
    return _open_file(file, notes)


def _open_file(file: Path, notes: tuple[str, ...] = ()) -> WeightSource:
    if file.name.endswith(".index.json"):
        return HuggingFaceSource(file.parent, file)
    source = OpenClipSource(file, notes)
    if not has_huggingface_names(list(source.shapes())):
        return source
    if not (file.parent / HUGGING_FACE_CONFIG).is_file():
        raise InputError(
            f"{file} has the names of Hugging Face's tensors, and no {HUGGING_FACE_CONFIG} is "
            "beside it, which says what they do not: heads, activation, epsilon, the end of a "
            "text; bring it"
        )
    return HuggingFaceSource(file.parent, file)


class OpenedModel(NamedTuple):
    """A checkpoint taken for a model: its weights, its preprocessing, and what to tell the user."""

    source: WeightSource
    weights: ModelWeights
    preprocess: Preprocess
    notes: tuple[str, ...]

    @property
    def architecture(self) -> Architecture:
        return self.weights.architecture


def open_model(
    path: str | Path, choice: ModelChoice, *, verify: bool = True, averages: bool = False
) -> OpenedModel:
    """Open a checkpoint of any format as the model that it says, or that `choice` names.

    verify and averages: as in `open_source`.

    Raises:
        InputError: as `open_source`, `choose_model` and `ModelWeights`.
    """
    source = open_source(path, verify=verify, averages=averages)
    architecture, settings = choose_model(choice, source.metadata)
    weights = ModelWeights(source, architecture, option=choice.name_option)
    preprocess, words = resolve_preprocess(architecture.vision.image_size, settings)
    return OpenedModel(source, weights, preprocess, (*weights.notes, f"preprocessing: {words}"))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str,
    precision: str = "fp32",
    also_bin: bool = False,
    choice: ModelChoice | None = None,
    optimizer_batch: int | None = None,
    license_name: str | None = None,
    ema: bool = False,
    mix: Sequence[tuple[str | Path, str | float]] = (),
) -> list[str]:
    """Write the model of `source` to the new or empty folder `target`, in another format.

    to: openclip, huggingface or run. precision: fp32, bf16 or fp16, not for run; also_bin: the
    pickled file as well, for openclip. choice: of another model than the source's own.
    optimizer_batch: carry AdamW's state of open_clip_train to a run, which has seen batches of so
    many pairs. license_name: for the model card, which names none without. ema: the averages of its
    weights (`ema.decay`). mix: the mean with other checkpoints of the same model, each with its
    share of the result, such as 0.5 or "1/3": `source` has what is left, which may be nothing; with
    `ema` those that have averages give these, too. Returns what to tell the user, a line each.

    Raises:
        InputError: no checkpoint, one of another architecture or damaged, or without averages, a
            target that holds something, or options that do not go together. Nothing is written
            then.
    """
    if to == "run" and (also_bin or precision != "fp32"):
        raise InputError("--to run keeps fp32 weights; leave --bin and --precision out")
    if to == "huggingface" and also_bin:
        raise InputError("--bin is for --to openclip: a Hugging Face folder has safetensors alone")
    check_license(license_name)
    if to == "run" and license_name is not None:
        raise InputError(
            "--license is for the model card, which a run folder has not; leave it out"
        )
    if to != "run" and optimizer_batch is not None:
        raise InputError(f"--with-optimizer is for --to run, not --to {to}")
    if mix and optimizer_batch is not None:
        raise InputError(
            "--with-optimizer goes on from the weights of SOURCE, not from a mean; leave --mix out"
        )
    shares = read_shares([share for _, share in mix])
    target, choice, optimizer = Path(target), choice or ModelChoice(), None
    check_target(target)
    opened = open_model(source, choice, averages=ema)
    parts = [MixedPart(Path(source), shares[0], opened.weights, ema)]
    for (path, _), share in zip(mix, shares[1:], strict=True):
        parts.append(_open_part(Path(path), share, opened.weights, choice, ema))
    if mix:
        opened = _mean_of(opened, parts)
    architecture, weights, preprocess = opened.architecture, opened.weights, opened.preprocess
    content, metadata = opened.source.content, opened.source.metadata
    tokenizer = tokenizer_files(metadata, architecture)
    notes = [*opened.notes, *target_notes(architecture, metadata.folder, to)]
    if tokenizer.files:
        notes.append(f"tokenizer: {tokenizer.name}, in {target}")
    elif tokenizer.name is not None:
        way_out = "name them as data.tokenizer" if to == "run" else f"put them into {target}"
        notes.append(
            f"tokenizer: the files of {tokenizer.name} are not beside the weights; {way_out}"
        )
    if optimizer_batch is not None:
        shapes = opened.source.shapes()
        optimizer = read_adamw(content, weights.stored_names, shapes, metadata.path)
        notes.append(f"AdamW's state after step {optimizer.step:,} comes along")
    elif (content or {}).get("optimizer"):
        notes.append(
            "its optimizer is left behind; --to run --with-optimizer --global-batch N takes it"
        )
    settings = preprocess.to_openclip()
    if to == "run":
        write_run(target, weights, settings, tokenizer, optimizer, optimizer_batch or 0)
    else:
        card = model_card(
            architecture,
            preprocess,
            tokenizer.name,
            precision,
            to,
            metadata.training,
            license_name,
            [part.facts for part in parts] if mix else [],
        )
        if to == "openclip":
            write_openclip(target, weights, settings, tokenizer, precision, also_bin, card)
        else:
            siglip = is_siglip(architecture)
            written = huggingface_tokenizer(tokenizer, architecture.text, siglip=siglip)
            notes += written.notes
            write_huggingface(target, weights, preprocess, written.files, precision, card)
    return [*notes, f"{architecture.name} from {metadata.path} is now in {target}"]


def _open_part(
    path: Path, share: Fraction, first: ModelWeights, choice: ModelChoice, ema: bool
) -> MixedPart:
    """A checkpoint to be averaged with `first`, whose model it has to be of."""
    opened = open_source(path)
    averages = ema and opened.metadata.has_averages
    if averages:
        opened = open_source(path, verify=False, averages=True)
    check_mixed_model(choice, first.architecture, first.metadata, opened.metadata)
    weights = ModelWeights(opened, first.architecture, option=choice.name_option)
    return MixedPart(path, share, weights, averages)


def _mean_of(opened: OpenedModel, parts: Sequence[MixedPart]) -> OpenedModel:
    """The mean of `parts`, of which `opened` is the first, in its place."""
    source = MixedSource(parts, opened.preprocess)
    weights = ModelWeights(source, opened.architecture)
    notes = (*opened.notes, *source.metadata.notes)
    return OpenedModel(source, weights, opened.preprocess, notes)
