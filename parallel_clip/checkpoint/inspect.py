"""What the `checkpoint` commands say of a run: which checkpoints there are, and whether intact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.errors import InputError


@dataclass(frozen=True)
class CheckpointState:
    """One checkpoint. complete: its manifest and meta.json are right; verified: all its files are;
    None: not looked at; problem: what is wrong."""

    step: int
    path: str
    bytes: int | None = None
    complete: bool = False
    verified: bool | None = None
    layout: dict[str, Any] | None = None
    time: str | None = None
    latest: bool = False
    problem: str | None = None


def find_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, or the one that `run` is itself.

    Raises:
        InputError: there are none.
    """
    run = Path(run)
    folders = [run] if (run / META_FILE).is_file() else commit.step_folders(run)
    if not folders:
        raise InputError(
            f"{run} holds no checkpoint: give a run folder (with {commit.CHECKPOINTS}/step_N in "
            "it), or a checkpoint folder"
        )
    return folders


def inspect_checkpoint(folder: Path, *, verify: bool = False) -> CheckpointState:
    """Read what a checkpoint says of itself. verify: hash all of its files."""
    pointer = folder.parent / commit.LATEST
    named = pointer.is_file() and pointer.read_text(errors="replace").strip() == folder.name
    try:
        manifest, meta = Manifest.read(folder), Meta.read(folder)
    except InputError as error:
        step = commit.step_of(folder) if folder.name.startswith("step_") else -1
        return CheckpointState(
            step, str(folder), verified=False if verify else None, latest=named, problem=str(error)
        )
    verified, problem = None, None
    if verify:
        try:
            manifest.verify(folder)
            verified = True
        except InputError as error:
            verified, problem = False, str(error)
    return CheckpointState(
        meta.step, str(folder), manifest.bytes, True, verified, meta.layout, manifest.time, named,
        problem,
    )  # fmt: skip


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint says of itself but its config, ready for JSON. Raises InputError
    as `Meta.read`."""
    manifest, meta = Manifest.read(folder), Meta.read(folder)
    said = asdict(meta)
    for long in ("config", "model", "grad_norms", "data"):
        said.pop(long)
    files = {name: record.bytes for name, record in manifest.files.items()}
    return (
        {"path": str(folder), "time": manifest.time, "bytes": manifest.bytes}
        | said
        | {"files": files}
    )


def layout_words(layout: dict[str, Any] | None) -> str:
    """'2 × 4 × 1', data × tensor × pipeline, or a dash."""
    if layout is None:
        return "-"
    words = " × ".join(str(layout[name]) for name in ("data", "tensor", "pipeline"))
    virtual = layout["virtual_pipeline"]
    return f"{words} ({virtual} virtual)" if virtual > 1 else words
