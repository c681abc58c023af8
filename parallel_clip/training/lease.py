"""The lease of a run folder: one job at a time trains in it.

A holder is a file in `RUN/lease/`, named by a number; the highest number holds. Between two that
come at once decides who creates the file that must not exist yet. The holder raises a counter in
its file every few seconds. A lease is stale when its process has ended, where that can be seen from
here, or when the counter has not moved for `STALE_SECONDS` of the watcher's own clock: other
machines' clocks, and the times of files, play no part.

The number and a random id are the fencing token: who takes over removes the older files, and a
holder whose file is gone may write nothing more (`Lease.check`).
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel_clip.checkpoint import durable
from parallel_clip.engine.process import ProcessId, own_process_id
from parallel_clip.errors import InputError, LeaseLostError

LEASE_FOLDER = "lease"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
SEEN_SECONDS = 20.0  # until every machine sees a new file: NFS keeps names for some seconds
_POLL_SECONDS = 0.5
_READ_TRIES = 5  # of a file that its holder may be writing to


@dataclass(frozen=True)
class LeaseToken:
    """Which lease: its file in the run folder, and the random id in it."""

    file: Path
    id: str

    def is_seen(self) -> bool:
        """Whether the lease is there, as seen from this machine, and still this one."""
        for _ in range(_READ_TRIES):
            found = _Holder.read(self.file)
            if found is not None:
                return found.id == self.id
            time.sleep(_POLL_SECONDS / 10)
        return False

    def wait_until_seen(self) -> bool:
        deadline = time.monotonic() + SEEN_SECONDS
        while not self.is_seen():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True


@dataclass(frozen=True)
class _Holder:
    id: str
    process: ProcessId
    beat: int = 0

    @classmethod
    def read(cls, file: Path) -> _Holder | None:
        """None where there is no file, or one that is just being written."""
        try:
            values = json.loads(file.read_text())
            return cls(values["id"], ProcessId(**values["process"]), values["beat"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def text(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


def take_lease(run_dir: Path, say: Callable[[str], None] = print) -> Lease:
    """Take the lease of a run folder, which is made if it is not there. Where another process holds
    it, wait until it is known to be stale.

    Raises:
        InputError: another process holds it and is alive.
    """
    folder = run_dir / LEASE_FOLDER
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = max(_lease_files(folder), default=None)
            if newest is not None:
                _wait_until_stale(newest, run_dir, say)
            number = 1 if newest is None else int(newest.stem) + 1
            holder = _Holder(secrets.token_hex(8), own_process_id())
            file = folder / f"{number:06d}.json"
            try:
                durable.write_new(file, [holder.text()])
            except FileExistsError:  # another start was quicker: that one holds it now
                continue
            for other in _lease_files(folder):
                if other < file:
                    other.unlink(missing_ok=True)
            return Lease(file, holder, missing)
    except OSError as error:
        _remove_if_empty(missing)
        raise InputError(
            f"run_dir {run_dir} cannot be written to: {error.strerror}; choose another run_dir"
        ) from None


class Lease:
    """A lease that this process holds: a thread shows that it is alive.

    created: folders that were made for it, innermost first.
    """

    def __init__(self, file: Path, holder: _Holder, created: list[Path]):
        self.token = LeaseToken(file, holder.id)
        self._holder = holder
        self._created = created
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError where another process has taken the lease over."""
        file = self.token.file
        if not self.token.is_seen() or max(_lease_files(file.parent)) != file:
            raise LeaseLostError(
                f"another job has taken {file.parent.parent} over, or the folder is gone"
            )

    def release(self) -> None:
        """Give the lease back, and remove the folders that were made for it and are empty."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if self.token.is_seen():
            self.token.file.unlink(missing_ok=True)
        _remove_if_empty([self.token.file.parent, *self._created])

    def _beat(self) -> None:
        beats = 0
        while not self._released.wait(BEAT_SECONDS):
            if not self.token.is_seen():
                continue
            beats += 1
            text = _Holder(self._holder.id, self._holder.process, beats).text()
            try:  # in its place, not renamed over: other machines look at this file anew
                with self.token.file.open("r+b", buffering=0) as file:
                    file.write(text)
                    os.fsync(file.fileno())
            except OSError:
                continue  # a disk that cannot be written to is found by the next save


def _wait_until_stale(file: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Return once the holder of `file` is known to have ended; InputError once it is known to be
    alive."""
    first = _Holder.read(file)
    if first is not None and first.process.is_known_gone():
        return
    who = first.process if first is not None else "a process that has just started"
    say(
        f"{run_dir} is held by {who}; waiting up to {STALE_SECONDS:.0f} s to see whether that is "
        "alive"
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if not file.exists():
            return
        holder = _Holder.read(file)
        if holder is None or first is None:
            first = first or holder
        elif (holder.id, holder.beat) != (first.id, first.beat):
            raise InputError(
                f"run_dir {run_dir} is in use: {holder.process} trains in it; choose another "
                "run_dir, or end that job first"
            )
        elif holder.process.is_known_gone():
            return
    say(f"{who} has shown no sign of life for {STALE_SECONDS:.0f} s; taking over")


def _lease_files(folder: Path) -> list[Path]:
    """By number, which is what their names sort by."""
    return sorted(file for file in folder.glob("*.json") if file.stem.isdigit())


def _remove_if_empty(folders: list[Path]) -> None:
    """Innermost first, up to one that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
