"""The memory of a machine, from files that say what kernels and containers say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel_clip.engine.host_memory import HostMemory, host_memory

GB = 10**9
V1 = "35 31 0:32 {mounted} {at} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2 = "41 31 0:38 {mounted} {at} rw,relatime - cgroup2 cgroup2 rw\n"
CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
UNLIMITED = 9223372036854771712  # as version 1 says it


class Machine:
    """A `/proc` and a `/sys` of 64 GB, of which others use 14, with this process's own 2."""

    def __init__(self, root: Path):
        self.root = root
        self.write(
            "proc/meminfo", "MemTotal: 62500000 kB\nMemFree: 1 kB\nMemAvailable: 46875000 kB\n"
        )
        self.process("self", parent=7, size=2 * GB)

    def write(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def process(self, name: object, parent: int, size: int) -> None:
        pid = 11 if name == "self" else name
        for each in {name, pid}:
            text = f"Name:\tpython\nPid:\t{pid}\nPPid:\t{parent}\nRssAnon:\t{size // 1024} kB"
            self.write(f"proc/{each}/status", text)

    def cgroup(self, line: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", line)
        self.write("proc/self/mountinfo", CPU + "".join(mounts))

    def memory(self, processes: int = 1) -> HostMemory:
        return host_memory(processes, self.root)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_without_limits_it_is_the_ram_less_what_others_use(machine):
    machine.cgroup("0::/\n1:cpu:/a", V2.format(mounted="/", at="/sys/fs/cgroup"))
    found = machine.memory()
    assert (found.size, found.source) == (64 * GB, "this machine")
    assert found.free == pytest.approx(50 * GB, abs=10**4)


def test_version_2_the_smallest_up_the_hierarchy(machine):
    machine.cgroup("0::/user/job/step", V2.format(mounted="/", at="/sys/fs/cgroup"))
    machine.write("sys/fs/cgroup/user/job/step/memory.max", "max")
    machine.write("sys/fs/cgroup/user/job/memory.max", 12 * GB)
    machine.write("sys/fs/cgroup/user/memory.max", 30 * GB)
    stat = f"anon {5 * GB}\nfile {4 * GB}\nshmem {GB}\ninactive_file {3 * GB}"
    machine.write("sys/fs/cgroup/user/job/memory.stat", stat)
    machine.write("sys/fs/cgroup/user/memory.stat", stat)
    found = machine.memory()
    assert (found.size, found.source) == (12 * GB, "the cgroup /sys/fs/cgroup/user/job")
    # 5 and 1 of shared memory, less this process's own 2; the page cache can be taken back.
    assert found.in_use == pytest.approx(4 * GB, abs=10**4)


def test_a_larger_limit_counts_where_more_of_it_is_filled(machine):
    machine.cgroup("0::/user/job", V2.format(mounted="/", at="/sys/fs/cgroup"))
    machine.write("sys/fs/cgroup/user/job/memory.max", 12 * GB)
    machine.write("sys/fs/cgroup/user/memory.max", 30 * GB)
    machine.write("sys/fs/cgroup/user/memory.stat", f"anon {29 * GB}")
    found = machine.memory()
    assert found.source == "the cgroup /sys/fs/cgroup/user"
    assert found.free == pytest.approx(3 * GB, abs=10**4)


def test_version_1(machine):
    at = "/sys/fs/cgroup/memory"
    machine.cgroup("4:cpu:/x\n5:hugetlb,memory:/docker/abc\n0::/", V1.format(mounted="/", at=at))
    machine.write(f"{at[1:]}/memory.limit_in_bytes", UNLIMITED)
    machine.write(f"{at[1:]}/docker/abc/memory.limit_in_bytes", 8 * GB)
    machine.write(f"{at[1:]}/docker/abc/memory.stat", f"rss 1\ntotal_rss {3 * GB}\ntotal_cache 9")
    found = machine.memory()
    assert (found.size, found.source) == (8 * GB, f"the cgroup {at}/docker/abc")
    assert found.in_use == pytest.approx(GB, abs=10**4)


@pytest.mark.parametrize(
    ("path", "mounted"),
    [
        ("/docker/abc", "/docker/abc"),  # the container's own part is mounted
        ("/", "/"),  # a namespace of its own
        ("/../other", "/"),  # likewise, and the process is outside
        ("/docker/abc", "/kubepods/x"),  # it cannot be told which part that is
    ],
)
def test_in_a_container_the_top_is_its_own(machine, path, mounted):
    at = "/sys/fs/cgroup"
    machine.cgroup(f"0::{path}", V2.format(mounted=mounted, at=at))
    machine.write("sys/fs/cgroup/memory.max", 4 * GB)
    assert machine.memory().size == 4 * GB


def test_ranks_of_one_launcher_are_no_others(machine):
    machine.process(12, parent=7, size=3 * GB)
    machine.process(13, parent=1, size=9 * GB)
    alone, together = machine.memory(1), machine.memory(2)
    assert together.free - alone.free == pytest.approx(3 * GB, abs=10**4)


def test_more_in_use_than_there_is_leaves_nothing(machine):
    machine.cgroup("0::/", V2.format(mounted="/", at="/sys/fs/cgroup"))
    machine.write("sys/fs/cgroup/memory.max", 4 * GB)
    machine.write("sys/fs/cgroup/memory.stat", f"anon {7 * GB}")
    assert machine.memory().free == 0


def test_without_proc_nothing_is_known(tmp_path):
    assert host_memory(1, tmp_path) is None


def test_this_machine(tmp_path):
    found = host_memory()
    assert found is not None
    assert 0 < found.free <= found.size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
