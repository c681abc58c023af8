"""Memory that processes on this machine may fill: the limit of their cgroup, else its RAM, less
what other processes have filled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class HostMemory(NamedTuple):
    """size: bytes of the RAM or of the limit; in_use: those that others have filled and that cannot
    be taken from them; source: whose limit it is, in words."""

    size: int
    in_use: int
    source: str

    @property
    def free(self) -> int:
        return max(0, self.size - self.in_use)


def host_memory(processes: int = 1, root: Path = Path("/")) -> HostMemory | None:
    """What `processes` ranks, of which this is one, may fill together. The least of the RAM and of
    the limits of this process's cgroup and those above it; None where none can be read.

    root: in which `/proc` and `/sys` lie. Swap is not counted: a run that swaps is of no use.
    """
    proc = root / "proc"
    ram = _numbers(proc / "meminfo", unit=1024)
    if not {"MemTotal", "MemAvailable"} <= ram.keys():
        return None
    own = _own_bytes(proc, processes)
    found = [
        HostMemory(ram["MemTotal"], ram["MemTotal"] - ram["MemAvailable"] - own, "this machine")
    ]
    for folder in memory_cgroups(root):
        limit, in_use = _limit(folder)
        if limit is not None and limit < ram["MemTotal"]:
            where = f"/{folder.relative_to(root)}"
            found.append(HostMemory(limit, in_use - own, f"the cgroup {where}"))
    return min((each._replace(in_use=max(0, each.in_use)) for each in found), key=lambda m: m.free)


# ------------------------------------------------------------------------------------- cgroups


def _limit(folder: Path) -> tuple[int | None, int]:
    """The limit of a cgroup in bytes, None where it has none, and what of it is filled and cannot
    be taken back: the page cache can."""
    used = _numbers(folder / "memory.stat")
    for name, kinds in (
        ("memory.max", ("anon", "shmem", "slab_unreclaimable")),
        ("memory.limit_in_bytes", ("total_rss", "total_shmem")),
    ):
        text = _read(folder / name).strip()
        if text.isdigit():
            return int(text), sum(used.get(kind, 0) for kind in kinds)
    return None, 0


def memory_cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's memory cgroup and of those above it, of version 1 and 2."""
    memberships = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        kind, *_, options = system.split() or ["", ""]
        if kind == "cgroup2":
            paths = [path for _, controllers, path in memberships if controllers == ""]
        elif kind == "cgroup" and "memory" in options.split(","):
            paths = [path for _, names, path in memberships if "memory" in names.split(",")]
        else:
            continue
        mounted, at = mount.split()[3:5]
        top = root / at.lstrip("/")
        for path in paths:
            inside = _below(path, mounted)
            yield from (top / part for part in (inside, *inside.parents))


def _below(path: str, mounted: str) -> PurePosixPath:
    """A cgroup's path from where its file system is mounted; in a container, which sees its own
    cgroup as the top, that may be the top itself."""
    try:
        inside = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        return PurePosixPath(".")
    return PurePosixPath(".") if ".." in inside.parts else inside


# ----------------------------------------------------------------------------------- processes


def _own_bytes(proc: Path, processes: int) -> int:
    """What the ranks have filled by now. Those of a machine have one parent: torchrun, or the
    launcher of a scheduler."""
    own = _status(proc / "self")
    found = [own]
    if processes > 1:
        others = (_status(path) for path in proc.iterdir() if path.name.isdigit())
        found += [s for s in others if s.get("PPid") == own.get("PPid") != 0 and s != own]
    return sum(status.get("RssAnon", 0) for status in found)


def _status(process: Path) -> dict[str, int]:
    """Numbers of a process's status, sizes in bytes; its id as Pid."""
    found = _numbers(process / "status")
    return found | {"RssAnon": 1024 * found.get("RssAnon", 0)}


def _numbers(file: Path, unit: int = 1) -> dict[str, int]:
    """Names and numbers of lines such as `MemTotal:  1234 kB` or `anon 1234`."""
    lines = (line.replace(":", " ").split() for line in _read(file).splitlines())
    return {
        words[0]: unit * int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()
    }


def _read(file: Path) -> str:
    """Its text; nothing where it cannot be read, as where there is no `/proc` or a process has
    ended."""
    try:
        return file.read_text()
    except OSError:
        return ""
