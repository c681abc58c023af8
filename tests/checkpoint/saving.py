"""A checkpoint of two small files, written as one rank writes it, and how to tell what it is."""

from __future__ import annotations

from pathlib import Path

import torch

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import (
    INDEX_FILE,
    Piece,
    PieceReader,
    write_index,
    write_pieces,
)


def save(run_dir: Path, step: int, value: float, keep: int | None = None) -> Path:
    """Save a checkpoint of `step` whose only tensor is full of `value`."""
    folder = commit.begin(run_dir, step)
    entries, files = write_pieces(folder, 0, [Piece("weight:a", torch.full((4, 3), value), (4, 3))])
    files[INDEX_FILE] = write_index(folder, entries)
    files[META_FILE] = Meta(step, 8 * step, 0, "small", {}, {}).write(folder)
    Manifest(files).write(folder)
    final = commit.commit(folder, step)
    if keep is not None:
        commit.prune(run_dir, keep)
    return final


def content(folder: Path) -> tuple[int, float]:
    """Step and value of a checkpoint, all of whose files are verified."""
    Manifest.read(folder).verify(folder)
    values = PieceReader(folder).read("weight:a").unique()
    assert len(values) == 1, "a mixture"
    return Meta.read(folder).step, values.item()
