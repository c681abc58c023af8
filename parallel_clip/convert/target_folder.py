"""The folder that a conversion writes: beside its place, and renamed when it is whole."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parallel_clip.checkpoint import durable
from parallel_clip.errors import InputError

_SUFFIX = ".unfinished"
_NAME_LENGTH = 40  # of the target's name, in that of the folder: a name has 255 bytes at most


def check_target(target: Path) -> Path:
    """`target` with links followed.

    Raises:
        InputError: it holds something, or is no folder.
    """
    try:
        target = target.resolve()  # what a link to an empty folder names
        exists, is_folder = target.exists(), target.is_dir()
        holds_something = is_folder and any(target.iterdir())
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, until Python 3.13
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{target} cannot be written: {reason}; name another folder") from None
    if exists and not is_folder:
        raise InputError(f"{target} is a file; name a new folder")
    if holds_something:
        raise InputError(f"{target} is not empty; name a new folder")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and is removed otherwise.
    Of several at a time with one target, the first that ends becomes it.

    Raises:
        InputError: `target` is not a new or empty folder, or cannot be written.
    """
    target = check_target(target)
    unfinished = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}")
    new_parents = [folder for folder in target.parents if not folder.exists()]
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        unfinished.mkdir()
        lock = _lock(unfinished)
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            durable.sync(path)
        _rename(unfinished, target)
        durable.sync(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write to {target}: {error.strerror or error}; make room, or name another "
            "folder"
        ) from None
    finally:
        durable.remove_folder(unfinished)
        if lock is not None:
            os.close(lock)
        if not target.exists():
            with suppress(OSError):  # another process may have put something into one
                for folder in new_parents:
                    folder.rmdir()


def _rename(unfinished: Path, target: Path) -> None:
    try:
        unfinished.rename(target)  # over an empty folder, too
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputError(
            f"another process has written {target} meanwhile, which stays as it is; name another "
            "folder"
        ) from None


def _prefix(target: Path) -> str:
    return f".{target.name[:_NAME_LENGTH]}."


def _remove_abandoned(target: Path) -> None:
    """Remove the folders of conversions to `target` that were killed, whose locks are free."""
    token = "[0-9a-f]" * 8
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}{token}{_SUFFIX}"):
        lock = _lock(folder, wait=False)
        if lock is not None:
            durable.remove_folder(folder)
            os.close(lock)


def _lock(folder: Path, *, wait: bool = True) -> int | None:
    """Hold a folder as long as the descriptor that is returned is open; None where another process
    holds it, or the file system has no locks."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
