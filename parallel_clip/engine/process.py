"""Which process this is, in words that hold across containers, reboots and reused process ids."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process on some machine.

    boot: the kernel's id of this boot; namespace: of process ids, one a container; start: in clock
    ticks since boot, so that a process id that is used again is told apart.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_known_gone(self) -> bool:
        """Whether the process has ended, as far as this one can tell: False on another machine or
        in another container, whose processes are not seen from here."""
        here = own_process_id()
        if (self.boot, self.namespace) != (here.boot, here.namespace):
            return False
        return _start_of(self.pid) != self.start


def own_process_id() -> ProcessId:
    pid = os.getpid()
    return ProcessId(
        socket.gethostname(),
        (_PROC / "sys/kernel/random/boot_id").read_text().strip(),
        os.readlink(_PROC / "self/ns/pid"),
        pid,
        _start_of(pid),
    )


def process_age() -> float:
    """Seconds since this process was started."""
    uptime = float((_PROC / "uptime").read_text().split()[0])
    return uptime - _start_of(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where there is none, or one that
    has ended and is only waited for."""
    try:
        fields = (_PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # state, starttime: man 5 proc
