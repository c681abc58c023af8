"""Open a checkpoint of any format, and convert it to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import META_FILE
from parallel_clip.convert.native import CheckpointSource, write_run
from parallel_clip.convert.openclip import OPENCLIP_WEIGHTS, OpenClipSource, write_openclip
from parallel_clip.convert.weight_source import ModelWeights, SourceMetadata, WeightSource
from parallel_clip.data.samples.transforms import Preprocess
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_models import load_architecture


def open_source(path: str | Path, *, verify: bool = True) -> WeightSource:
    """Open a run folder (its latest checkpoint), a checkpoint folder, or OpenCLIP's file or folder.

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
    folder = commit.latest(path) or (path if (path / META_FILE).is_file() else None)
    if folder is not None:
        return CheckpointSource(folder, verify)
    for file in (path, *(path / name for name in OPENCLIP_WEIGHTS)):
        if file.is_file():
            return OpenClipSource(file)
    if (path / "config.json").is_file():
        raise InputError(
            f"{path} looks like a Hugging Face checkpoint, which is not read yet; "
            "give an OpenCLIP checkpoint (open_clip_model.safetensors) of the same model"
        )
    raise InputError(
        f"{path} holds no checkpoint: expected a run folder (checkpoints/latest), a checkpoint "
        f"folder ({META_FILE}), or an OpenCLIP folder ({' or '.join(OPENCLIP_WEIGHTS)})"
    )


def open_initial_weights(
    path: str | Path | None, architecture: Architecture, *, verify: bool = True
) -> ModelWeights | None:
    """The weights of `init.from`; None where a run begins with random ones."""
    if path is None:
        return None
    source = open_source(path, verify=verify)
    # A model trained with InfoNCE has no bias: one that goes on with sigmoid begins with ours.
    return ModelWeights(source, architecture, optional=("logit_bias",))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str,
    precision: str = "fp32",
    also_bin: bool = False,
    model_name: str | None = None,
) -> SourceMetadata:
    """Write the model of `source` to the new or empty folder `target`, in another format.

    to: openclip or run. precision: fp32, bf16 or fp16, and also_bin: the pickled file as well, are
    for openclip. model_name: for a source that does not say which model it is. Returns the source's
    metadata, with the architecture in any case.

    Raises:
        InputError: no checkpoint, one of another architecture or damaged, a target that holds
            something, or options that do not go together.
    """
    if to == "huggingface":
        raise InputError("--to huggingface is not built yet; --to openclip and --to run are")
    if to == "run" and (also_bin or precision != "fp32"):
        raise InputError("--to run keeps fp32 weights; leave --bin and --precision out")
    opened, target = open_source(source), Path(target)
    metadata = opened.metadata
    architecture = load_architecture(model_name) if model_name else metadata.architecture
    if architecture is None:
        raise InputError(f"{source} does not say which model it is; add --model NAME")
    weights = ModelWeights(opened, architecture)
    size = architecture.vision.image_size
    preprocess = Preprocess.from_openclip(size, metadata.preprocess).to_openclip()
    if to == "run":
        write_run(target, weights, preprocess, metadata.tokenizer)
    else:
        write_openclip(target, weights, preprocess, precision, also_bin)
    return replace(metadata, architecture=architecture)
