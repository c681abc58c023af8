"""Commit a checkpoint: written into a folder of its own, shown by one rename, named in `latest`.

A crash, or a kill, at any moment leaves each step's checkpoint old or new and whole:

1. Files, index and manifest are written and flushed in `.unfinished_step_N_TOKEN`, and the new
   pointer in `.latest_TOKEN`.
2. The folder is renamed to `step_N`. One that is there already is exchanged with it in one step;
   where the file system cannot do that, it waits as `.replaced_step_N` meanwhile, and is found
   there after a crash.
3. The pointer is renamed to `latest`.

Whoever takes a run folder over removes both of another's names first (`clean`): what a process
that was thought dead does afterwards fails at its next rename.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.manifest import MANIFEST_FILE
from parallel_clip.errors import InputError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
EVALUATIONS_FILE = "evaluations.jsonl"  # of a run folder, beside its checkpoints
_STEP_FOLDER = re.compile(r"step_(\d{8,})$")
_UNFINISHED, _REPLACED, _REMOVED = ".unfinished_", ".replaced_", ".removed_"


def begin(run_dir: Path, step: int) -> Path:
    """Make and return a new folder to write the checkpoint of `step` into."""
    checkpoints = run_dir / CHECKPOINTS
    folder = checkpoints / f"{_UNFINISHED}{_step_name(step)}_{secrets.token_hex(4)}"
    # Not its parents: a run folder that is gone must not come back.
    checkpoints.mkdir(exist_ok=True)
    folder.mkdir()
    return folder


def commit(folder: Path, step: int, check: Callable[[], None] = lambda: None) -> Path:
    """Show the checkpoint of `step` that was written into `folder`; returns its final folder.

    check: called right before the rename; raises where this process may no longer write.
    """
    checkpoints = folder.parent
    final = checkpoints / _step_name(step)
    durable.sync(folder)
    pointer = checkpoints / f".{LATEST}_{secrets.token_hex(4)}"
    durable.write_new(pointer, [f"{final.name}\n".encode()])
    check()
    replaced = None
    if not final.exists():
        folder.rename(final)
    elif durable.exchange(folder, final):
        replaced = folder
    else:
        replaced = final.rename(checkpoints / f"{_REPLACED}{final.name}")
        folder.rename(final)
    durable.sync(checkpoints)
    pointer.replace(checkpoints / LATEST)
    durable.sync(checkpoints)
    if replaced is not None:
        durable.remove_folder(replaced)
    return final


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints up to the one that `latest` names.

    Later ones are there when someone went back to an earlier one by hand; they are left alone.
    """
    folders = step_folders(run_dir)
    for old in folders[: folders.index(latest(run_dir)) + 1][:-keep]:
        durable.remove_folder(old.rename(old.with_name(f"{_REMOVED}{old.name}")))


def clean(run_dir: Path) -> list[str]:
    """Remove what crashes left among the checkpoints, and take back a checkpoint that one left
    under its other name. Returns what was done, a line each."""
    done = []
    checkpoints = run_dir / CHECKPOINTS
    for path in sorted(checkpoints.glob(".*")) if checkpoints.is_dir() else ():
        if path.name.startswith(_REPLACED):
            final = path.with_name(path.name.removeprefix(_REPLACED))
            if not final.exists():
                path.rename(final)
                done.append(f"{final} is back: a crash came while it was being replaced")
                continue
        if path.name.startswith((_UNFINISHED, _REPLACED, _REMOVED)):
            durable.remove_folder(path)
            done.append(f"removed {path}, left by a crash")
        elif path.name.startswith(f".{LATEST}_"):
            path.unlink()
    return done


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest where there is no such file, as after a
    crash in the first commit; None where there is no checkpoint.

    Raises:
        InputError: `latest` does not name a checkpoint that is there.
    """
    folders = step_folders(run_dir)
    pointer = run_dir / CHECKPOINTS / LATEST
    if not pointer.is_file():
        return next((f for f in reversed(folders) if (f / MANIFEST_FILE).is_file()), None)
    name = pointer.read_text(errors="replace").strip()
    if _STEP_FOLDER.match(name):
        for folder in (pointer.with_name(name), pointer.with_name(f"{_REPLACED}{name}")):
            if folder.is_dir():
                return folder
    others = ", ".join(f.name for f in folders) or "none"
    raise InputError(
        f"{pointer} names {name!r}, which is not there (there is: {others}); "
        "write the name of a complete one into it"
    )


def step_folders(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first; whole or not is not looked at."""
    checkpoints = run_dir / CHECKPOINTS
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    folders = [f for f in found if _STEP_FOLDER.match(f.name) and f.is_dir()]
    return sorted(folders, key=step_of)


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of a checkpoint, whether it is there or not."""
    return run_dir / CHECKPOINTS / _step_name(step)


def step_of(folder: Path) -> int:
    """The step of a folder that `latest` or `step_folders` returned."""
    return int(_STEP_FOLDER.search(folder.name)[1])


def _step_name(step: int) -> str:
    return f"step_{step:08d}"
