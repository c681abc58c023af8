"""Open a checkpoint of any format, and convert it to another."""

from __future__ import annotations

from pathlib import Path

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import META_FILE
from parallel_clip.convert.choose_model import (
    ModelChoice,
    choose_model,
    resolve_preprocess,
    tokenizer_files,
)
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.native import CheckpointSource, write_run
from parallel_clip.convert.openclip import OpenClipSource, find_openclip_file, write_openclip
from parallel_clip.convert.openclip_optimizer import read_adamw
from parallel_clip.convert.target_folder import check_target
from parallel_clip.convert.weight_source import WeightSource
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture

_HUGGING_FACE_NAMES = ("vision_model.", "text_model.")


def open_source(path: str | Path, *, verify: bool = True) -> WeightSource:
    """Open a run folder (its latest checkpoint), a checkpoint folder, or a file or folder of
    OpenCLIP's, or a file of OpenAI's.

    verify: hash all files of a checkpoint of ours before anything is taken from it.

    Raises:
        InputError: it is none of these, or is not whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist (paths start from {Path.cwd()}); give a run folder, "
            "a checkpoint folder, or an OpenCLIP file or folder"
        )
    file, notes = path, ()
    if path.is_dir():
        folder = commit.latest(path) or (path if (path / META_FILE).is_file() else None)
        if folder is not None:
            return CheckpointSource(folder, verify)
        file, notes = find_openclip_file(path)
    source = OpenClipSource(file, notes) if file is not None else None
    if source is None and not (path / "config.json").is_file():
        raise InputError(
            f"{path} holds no checkpoint: expected a run folder (checkpoints/latest), a checkpoint "
            f"folder ({META_FILE}), or OpenCLIP's weights (open_clip_model.safetensors)"
        )
    if source is None or any(name.startswith(_HUGGING_FACE_NAMES) for name in source.shapes()):
        raise InputError(
            f"{path} looks like a Hugging Face checkpoint, which is not read yet; give an OpenCLIP "
            "checkpoint (open_clip_model.safetensors) of the same model"
        )
    return source


def open_initial_weights(source: WeightSource, architecture: Architecture) -> ModelWeights:
    """The weights of `init.from`."""
    # A model trained with InfoNCE has no bias: one that goes on with sigmoid begins with ours.
    return ModelWeights(source, architecture, optional=("logit_bias",))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str,
    precision: str = "fp32",
    also_bin: bool = False,
    choice: ModelChoice | None = None,
    optimizer_batch: int | None = None,
) -> list[str]:
    """Write the model of `source` to the new or empty folder `target`, in another format.

    to: openclip or run. precision: fp32, bf16 or fp16, and also_bin: the pickled file as well, are
    for openclip. choice: of another model than the source's own. optimizer_batch: carry AdamW's
    state of open_clip_train to a run, which has seen batches of so many pairs. Returns what to tell
    the user, a line each.

    Raises:
        InputError: no checkpoint, one of another architecture or damaged, a target that holds
            something, or options that do not go together. Nothing is written then.
    """
    if to == "huggingface":
        raise InputError("--to huggingface is not built yet; --to openclip and --to run are")
    if to == "run" and (also_bin or precision != "fp32"):
        raise InputError("--to run keeps fp32 weights; leave --bin and --precision out")
    if to != "run" and optimizer_batch is not None:
        raise InputError(f"--with-optimizer is for --to run, not --to {to}")
    target, choice, optimizer = Path(target), choice or ModelChoice(), None
    check_target(target)
    opened = open_source(source)
    metadata = opened.metadata
    architecture, settings = choose_model(choice, metadata)
    weights = ModelWeights(opened, architecture, option=choice.name_option)
    preprocess, preprocess_words = resolve_preprocess(architecture.vision.image_size, settings)
    tokenizer = tokenizer_files(metadata, architecture)
    notes = [*weights.notes, f"preprocessing: {preprocess_words}"]
    if tokenizer.files:
        notes.append(f"tokenizer: {tokenizer.name}, in {target}")
    elif tokenizer.name is not None:
        way_out = f"put them into {target}" if to == "openclip" else "name them as data.tokenizer"
        notes.append(
            f"tokenizer: the files of {tokenizer.name} are not beside the weights; {way_out}"
        )
    if optimizer_batch is not None:
        names = weights.stored_names
        optimizer = read_adamw(opened.content, names, opened.shapes(), metadata.path)
        notes.append(f"AdamW's state after step {optimizer.step:,} comes along")
    elif (opened.content or {}).get("optimizer"):
        notes.append(
            "its optimizer is left behind; --to run --with-optimizer --global-batch N takes it"
        )
    if to == "run":
        write_run(
            target, weights, preprocess.to_openclip(), tokenizer, optimizer, optimizer_batch or 0
        )
    else:
        write_openclip(target, weights, preprocess.to_openclip(), tokenizer, precision, also_bin)
    return [*notes, f"{architecture.name} from {metadata.path} is now in {target}"]
