"""`manifest.json`: size and hash of every other file of a checkpoint. It is written last, so that a
folder without one is no checkpoint."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.durable import FileRecord
from parallel_clip.errors import InputError

MANIFEST_FILE = "manifest.json"
_READERS = 8  # files hashed at once; hashing and reading release the interpreter's lock


def utc_now() -> str:
    """The time as files of a run have it: ISO 8601, UTC, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, and when it was written (UTC)."""

    files: Mapping[str, FileRecord]
    time: str = field(default_factory=utc_now)

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def write(self, folder: Path) -> None:
        durable.write_new(folder / MANIFEST_FILE, [self._text().encode()])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest itself.

        Raises:
            InputError: there is none, or it is not what was written.
        """
        path = folder / MANIFEST_FILE
        try:
            text = path.read_text()
            values = json.loads(text)
            files = {name: FileRecord(*record) for name, record in values["files"].items()}
            manifest = cls(files, values["time"])
            if any(Path(name).name != name for name in files) or text != manifest._text():
                raise ValueError("not what was written")
        except FileNotFoundError:
            raise InputError(
                f"{folder} has no {MANIFEST_FILE}: it was not written to its end, or by an earlier "
                "version of parallel_clip, which can go on with it; use another checkpoint"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); use another checkpoint") from None
        return manifest

    def verify(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Hash files and compare: those in `names`, or all.

        Raises:
            InputError: one is missing, cut off or changed; the message names it.
        """
        names = sorted(self.files) if names is None else sorted(names)
        with ThreadPoolExecutor(min(_READERS, len(names) or 1)) as pool:
            list(pool.map(lambda name: self._verify_file(folder, name), names))

    def _verify_file(self, folder: Path, name: str) -> None:
        expected = self.files.get(name)
        try:
            size = (folder / name).stat().st_size
            found = durable.hash_file(folder / name)
        except OSError as error:
            raise InputError(
                f"{folder / name} cannot be read ({error.strerror}); the checkpoint is not whole, "
                "use another one"
            ) from None
        if expected is None or size != expected.bytes:
            wanted = "is not in the manifest" if expected is None else f"had {expected.bytes:,}"
            raise InputError(
                f"{folder / name} has {size:,} bytes and {wanted} when it was written; the "
                "checkpoint is damaged, use another one"
            )
        if found != expected:
            raise InputError(
                f"{folder / name} is not what was written (hash {found.hash}, in {MANIFEST_FILE} "
                f"{expected.hash}); the checkpoint is damaged, use another one"
            )

    def _text(self) -> str:
        """The file's text; its last key is the hash of the others."""
        values = {"time": self.time, "files": {k: list(v) for k, v in sorted(self.files.items())}}
        values["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(values).encode())
        return json.dumps(values, indent=1) + "\n"
