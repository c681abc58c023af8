"""Our own checkpoints: one as a source of weights, and writing a run folder to train from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel_clip.checkpoint import commit, durable
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import (
    INDEX_FILE,
    Piece,
    PieceReader,
    write_index,
    write_pieces,
)
from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.openclip_optimizer import AdamWState
from parallel_clip.convert.target_folder import new_folder
from parallel_clip.convert.training_facts import read_training_facts
from parallel_clip.convert.weight_source import SourceMetadata
from parallel_clip.data.samples.saved_tokenizer import has_tokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer import AVERAGE

_FILE_BYTES = 32 << 20  # of pieces: a conversion holds few tensors


class CheckpointSource:
    """The weights (fp32 masters) of one of our checkpoints, or their averages.

    verify: hash all of its files first. averages: read those of `ema.decay`; what is not trained
    has none, and its weights are read.

    Raises:
        InputError: a file is not what was written, or averages are not there.
    """

    content = None

    def __init__(self, folder: Path, verify: bool = True, averages: bool = False):
        if verify:
            Manifest.read(folder).verify(folder)
        meta = Meta.read(folder)
        if averages and not meta.has_averages:
            raise InputError(
                f"{folder} has no averages of weights, as its run was without ema.decay; leave "
                "--ema out"
            )
        self._averages = averages
        self._reader = PieceReader(folder)
        self.metadata = SourceMetadata(
            path=folder,
            folder=folder,
            architecture=architecture_from_json(meta.model, meta.model_name),
            preprocess=meta.preprocess,
            tokenizer=str(folder) if has_tokenizer(folder) else meta.tokenizer,
            said_by=folder / META_FILE,
            step=meta.step,
            has_averages=meta.has_averages,
            training=read_training_facts(folder, meta, averages),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        keys = [key for key in self._reader.keys() if key.startswith("weight:")]
        return {key.removeprefix("weight:"): self._reader.shape(key) for key in keys}

    def read(self, name: str) -> Tensor:
        key = f"{AVERAGE}:{name}"
        if not (self._averages and key in self._reader):
            key = f"weight:{name}"
        tensor = self._reader.read(key)
        self._reader.close_files()
        return tensor


def write_run(
    target: Path,
    weights: ModelWeights,
    preprocess: Mapping[str, Any],
    tokenizer: TokenizerFiles,
    optimizer: AdamWState | None = None,
    global_batch: int = 0,
) -> None:
    """Write a run folder with one checkpoint: step 0 without optimizer moments, or the step of an
    optimizer's state, after so many batches of `global_batch`.

    preprocess: OpenCLIP's preprocess_cfg. InputError: `target` is not a new or empty folder.
    """
    step = optimizer.step if optimizer is not None else 0
    choice = "openclip" if tokenizer.name is None else None
    meta = Meta.of_model(weights.architecture, preprocess, choice)
    meta = replace(
        meta,
        step=step,
        position=step * global_batch,
        updates=step,
        has_moments=optimizer is not None,
        model=tokenizer.named_in(meta.model),
    )

    shapes = {p.name: p.shape for p in parameter_table(weights.architecture)}

    def pieces() -> Iterator[Piece]:
        for name in weights.stored_names:
            yield _piece(f"weight:{name}", weights.read(name), shapes[name])
            moments = optimizer.moments[name] if optimizer is not None else {}
            for kind, values in moments.items():
                yield _piece(f"{kind}:{name}", values, shapes[name])

    with new_folder(target) as run:
        folder = commit.begin(run, step)
        entries, files = write_pieces(folder, 0, pieces(), _FILE_BYTES)
        files[META_FILE] = meta.write(folder)
        for name, content in tokenizer.files.items():
            files[name] = durable.write_new(folder / name, [content])
        files[INDEX_FILE] = write_index(folder, entries)
        Manifest(files).write(folder)
        commit.commit(folder, step)


def _piece(key: str, values: Tensor, shape: tuple[int, ...]) -> Piece:
    # No copy of what is fp32 already: nothing here changes a tensor that was read.
    return Piece(key, values.float().contiguous().reshape(shape), shape)
