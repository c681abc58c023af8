"""Our own checkpoints: one as a source of weights, and writing a run folder to train from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import (
    INDEX_FILE,
    Piece,
    PieceReader,
    host_copy,
    write_index,
    write_pieces,
)
from parallel_clip.convert.weight_source import ModelWeights, SourceMetadata, make_empty_folder
from parallel_clip.model.openclip_json import architecture_from_json


class CheckpointSource:
    """The weights (fp32 masters) of one of our checkpoints.

    verify: hash all of its files first; InputError where one is not what was written.
    """

    def __init__(self, folder: Path, verify: bool = True):
        if verify:
            Manifest.read(folder).verify(folder)
        meta = Meta.read(folder)
        self._reader = PieceReader(folder)
        self.metadata = SourceMetadata(
            architecture=architecture_from_json(meta.model, meta.model_name),
            preprocess=meta.preprocess,
            tokenizer=meta.tokenizer,
            folder=folder,
            step=meta.step,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        keys = [key for key in self._reader.keys() if key.startswith("weight:")]
        return {key.removeprefix("weight:"): self._reader.shape(key) for key in keys}

    def read(self, name: str) -> Tensor:
        return self._reader.read(f"weight:{name}")


def write_run(target: Path, weights: ModelWeights, preprocess: dict, tokenizer: str | None) -> None:
    """Write a run folder whose only checkpoint is step 0, without optimizer moments.

    preprocess: OpenCLIP's preprocess_cfg; tokenizer: as `data.tokenizer`. InputError: `target` is
    not a new or empty folder.
    """
    tensors = weights.read_all()  # before anything is written: the source may be damaged
    make_empty_folder(target)
    folder = commit.begin(target, 0)
    pieces = (
        Piece(f"weight:{name}", host_copy(tensor.float()), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    entries, files = write_pieces(folder, 0, pieces)
    meta = Meta.of_model(weights.architecture, preprocess, tokenizer)
    files[META_FILE] = replace(meta, has_moments=False).write(folder)
    files[INDEX_FILE] = write_index(folder, entries)
    Manifest(files).write(folder)
    commit.commit(folder, 0)
