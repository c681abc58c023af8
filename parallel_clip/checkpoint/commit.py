"""Commit a checkpoint: written under another name, renamed when complete, named in `latest`.

A crash at any moment leaves the newest complete checkpoint where `latest` says it is.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from parallel_clip.errors import InputError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_(\d{8,})$")


def unfinished_folder(run_dir: Path, step: int) -> Path:
    """The folder that a checkpoint is written to before it counts."""
    return run_dir / CHECKPOINTS / f"unfinished_step_{step:08d}"


def begin(run_dir: Path, step: int) -> Path:
    """Make and return the empty folder to write `step` into; what a crash has left there goes."""
    folder = unfinished_folder(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(run_dir: Path, step: int) -> Path:
    """Flush and rename the checkpoint of `step` and point `latest` to it; returns its folder."""
    unfinished = unfinished_folder(run_dir, step)
    final = run_dir / CHECKPOINTS / f"step_{step:08d}"
    for file in unfinished.iterdir():
        _flush_to_disk(file)
    shutil.rmtree(final, ignore_errors=True)  # of an earlier try at the same step
    unfinished.rename(final)
    _point_latest_to(final)
    return final


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints up to the one that `latest` names.

    Later ones are there when someone went back to an earlier one by hand; they are left alone.
    """
    folders = _step_folders(run_dir)
    for old in folders[: folders.index(latest(run_dir)) + 1][:-keep]:
        shutil.rmtree(old)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None where there is none. InputError: the file
    `latest` names a folder that is not there."""
    pointer = run_dir / CHECKPOINTS / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    folder = pointer.parent / name
    if not name or not folder.is_dir():
        others = ", ".join(f.name for f in _step_folders(run_dir)) or "none"
        raise InputError(
            f"{pointer} names {name!r}, which is not there (there is: {others}); "
            "write the name of a complete one into it"
        )
    return folder


def _step_folders(run_dir: Path) -> list[Path]:
    folders = [f for f in (run_dir / CHECKPOINTS).iterdir() if _STEP_FOLDER.match(f.name)]
    return sorted(folders, key=lambda f: int(_STEP_FOLDER.match(f.name)[1]))


def _point_latest_to(folder: Path) -> None:
    temporary = folder.parent / f".{LATEST}"
    temporary.write_text(folder.name + "\n")
    _flush_to_disk(temporary)
    temporary.replace(folder.parent / LATEST)
    _flush_to_disk(folder.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
