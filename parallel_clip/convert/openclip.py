"""Writing checkpoints for others: OpenCLIP's folder, or a run folder to train from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import PieceWriter, save_tensors, write_index
from parallel_clip.convert.names import parameter_table
from parallel_clip.convert.source import OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, ModelWeights
from parallel_clip.errors import InputError
from parallel_clip.model.architectures import Architecture

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_openclip(
    target: Path,
    weights: ModelWeights,
    architecture: Architecture,
    preprocess: dict,
    precision: str = "fp32",
    also_bin: bool = False,
) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:TARGET")` loads.

    Raises:
        InputError: `target` is not a new or empty folder.
    """
    dtype = PRECISIONS[precision]
    # Read before anything is written: the source may be damaged.
    state = {name: tensor.to(dtype) for name, tensor in _all_tensors(weights, architecture)}
    make_empty_folder(target)
    settings = {"model_cfg": architecture.json, "preprocess_cfg": preprocess}
    (target / OPENCLIP_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    save_tensors(state, target / OPENCLIP_WEIGHTS[0])
    if also_bin:
        torch.save(state, target / OPENCLIP_WEIGHTS[1])


def write_run(
    target: Path,
    weights: ModelWeights,
    architecture: Architecture,
    preprocess: dict,
    tokenizer: str | None,
) -> None:
    """Write a run folder whose only checkpoint is step 0, without optimizer moments.

    Raises:
        InputError: `target` is not a new or empty folder.
    """
    tensors = _all_tensors(weights, architecture)
    make_empty_folder(target)
    folder = commit.begin(target, 0)
    writer = PieceWriter(folder, rank=0)
    for name, tensor in tensors:
        writer.add(f"weight:{name}", tensor.float(), tuple(tensor.shape), axis=0, start=0)
    writer.flush()
    write_index(folder, writer.entries)
    Meta(
        step=0,
        position=0,
        bad_samples=0,
        model_name=architecture.name,
        model=architecture.json,
        preprocess=preprocess,
        tokenizer=tokenizer,
        has_moments=False,
    ).write(folder)
    commit.commit(target, 0, keep=None)


def make_empty_folder(target: Path) -> None:
    """Nothing is ever overwritten."""
    try:
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} is not empty; name a new folder")
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror}") from None


def _all_tensors(weights: ModelWeights, architecture: Architecture) -> list[tuple[str, Tensor]]:
    return [(p.name, weights.read(p.name).contiguous()) for p in parameter_table(architecture)]
