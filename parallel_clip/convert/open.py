"""Open weights of any kind: a run, one of its checkpoints, or OpenCLIP's files."""

from __future__ import annotations

from pathlib import Path

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.meta import META_FILE
from parallel_clip.convert.openclip import OPENCLIP_WEIGHTS, OpenClipSource
from parallel_clip.convert.weight_source import CheckpointSource, WeightSource
from parallel_clip.errors import InputError


def open_source(path: str | Path) -> WeightSource:
    """Open a run folder (its latest checkpoint), a checkpoint folder, or OpenCLIP's file or folder.

    Raises:
        InputError: it is none of these, or is not whole.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"checkpoint {path} does not exist (paths start from {Path.cwd()}); give a run folder, "
            "a checkpoint folder, or an OpenCLIP file or folder"
        )
    if path.is_file():
        return OpenClipSource(path)
    newest = commit.latest(path)
    if newest is not None:
        return CheckpointSource(newest)
    if (path / META_FILE).is_file():
        return CheckpointSource(path)
    for name in OPENCLIP_WEIGHTS:
        if (path / name).is_file():
            return OpenClipSource(path / name)
    if (path / "config.json").is_file():
        raise InputError(
            f"{path} looks like a Hugging Face checkpoint, which is not read yet; "
            "give an OpenCLIP checkpoint (open_clip_model.safetensors) of the same model"
        )
    raise InputError(
        f"{path} holds no checkpoint: expected a run folder (checkpoints/latest), a checkpoint "
        f"folder ({META_FILE}), or an OpenCLIP folder ({' or '.join(OPENCLIP_WEIGHTS)})"
    )
