"""Which disk a folder is on, and where a machine's own cache may be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# File systems of a network, as the kernel names them; of FUSE, what follows the dot.
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "9p",
    "panfs", "wekafs", "glusterfs", "orangefs", "pvfs2", "ncpfs", "sshfs", "s3fs", "gcsfuse",
    "goofys", "juicefs", "daos", "quobyte", "cvmfs", "efs", "fuse.cvmfs2", "virtiofs",
}  # fmt: skip
_MOUNTS = Path("/proc/self/mounts")


class CacheFolder(NamedTuple):
    """Where pages are kept, and why there, in words."""

    path: Path
    reason: str


def settings_folder() -> Path:
    """`$PARALLEL_CLIP_CACHE`, else `~/.cache/parallel_clip`: for indexes, which are small and which
    machines may share."""
    chosen = os.environ.get("PARALLEL_CLIP_CACHE")
    return Path(chosen) if chosen else _home() / ".cache" / "parallel_clip"


def pages_folder() -> CacheFolder:
    """The folder of pages that all processes of a user on this machine share: on a disk of its own,
    for pages on a network disk would cross the network twice."""
    if os.environ.get("PARALLEL_CLIP_CACHE"):
        return CacheFolder(settings_folder() / "pages", "PARALLEL_CLIP_CACHE says so")
    kind = network_kind(_home())
    if kind is None:
        return CacheFolder(settings_folder() / "pages", "the home folder is on this machine's disk")
    for variable in ("SLURM_TMPDIR", "TMPDIR"):
        place = os.environ.get(variable)
        if place and os.path.isdir(place) and network_kind(Path(place)) is None:
            break
    else:
        variable, place = "/tmp", "/tmp"
    return CacheFolder(
        Path(place) / f"parallel_clip-{os.getuid()}" / "pages",
        f"{variable}, as the home folder is on a network disk ({kind}); PARALLEL_CLIP_CACHE names "
        "another",
    )


def network_kind(path: Path, mounts: str | None = None) -> str | None:
    """The kind of the network file system that a folder is on; None for a disk of this machine.

    mounts: the contents of /proc/self/mounts; None reads them.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text(errors="surrogateescape")
        except OSError:
            return None
    place, best, found = os.path.realpath(path), "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ").rstrip("/")
        if len(mount) >= len(best) and f"{place}/".startswith(f"{mount}/"):
            best, found = mount, fields[2]
    kind = found.removeprefix("fuse.")
    return found if kind in _NETWORK or found in _NETWORK else None


def _home() -> Path:
    return Path(os.path.expanduser("~"))
