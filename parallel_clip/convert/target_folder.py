"""The folder that a conversion writes: beside its place, and renamed when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel_clip.checkpoint import durable
from parallel_clip.errors import InputError


def check_target(target: Path) -> None:
    """InputError: `target` holds something, or is no folder."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; name a new folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and is removed otherwise.

    Raises:
        InputError: `target` is not a new or empty folder, or cannot be written.
    """
    check_target(target)
    target = target.resolve()  # what a link to an empty folder names
    unfinished = target.with_name(f".{target.name}.unfinished")
    new_parents = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if unfinished.exists():
            durable.remove_folder(unfinished)  # of a conversion that was killed
        unfinished.mkdir()
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            durable.sync(path)
        unfinished.rename(target)  # over an empty folder, too
        durable.sync(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write to {target}: {error.strerror or error}; make room, or name another "
            "folder"
        ) from None
    finally:
        durable.remove_folder(unfinished)
        if not target.exists():
            with suppress(OSError):  # another process may have put something into one
                for folder in new_parents:
                    folder.rmdir()
