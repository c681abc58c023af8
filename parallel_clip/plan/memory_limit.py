"""How much memory a rank has: what the config says, else the GPU's or a share of this machine's."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_clip.config import Config, parse_bytes
from parallel_clip.engine.device import gpu_memory, has_cuda
from parallel_clip.engine.host_memory import host_memory

# Of a GPU's free memory, for graphs that are kept to save time: what is estimated beside what is
# counted has not been held against a GPU. A layout that needs more than this is not refused.
PART_TO_FILL = 0.9


@dataclass(frozen=True)
class MemoryLimit:
    """size: bytes that a rank may fill; words: whose they are; to_fill: the part of them that
    `parallel.stash: auto` fills, None: not known, or not to be filled for speed alone; is_own:
    whether the run has this memory, which a dry run for other machines cannot tell."""

    size: int
    words: str
    to_fill: int | None
    is_own: bool = True


@dataclass(frozen=True)
class Machine:
    """Where ranks run. ranks: on a machine; is_this_one: False where a dry run is for processes
    that may be started elsewhere; asks_gpu: False where this process is to leave GPUs alone."""

    ranks: int
    is_this_one: bool = True
    asks_gpu: bool = True


def ranks_on_machine(world_size: int, local_size: int | None = None) -> int:
    """local_size: where the launcher says it; else as many as machines usually take."""
    return local_size or min(8, world_size)


def find_memory_limit(config: Config, machine: Machine) -> MemoryLimit | None:
    """None where it is not known: in a dry run beside a GPU, or without `/proc`."""
    told = config.parallel.memory
    if told is not None:
        size = parse_bytes(told)
        return MemoryLimit(size, f"parallel.memory {told}", size)
    if has_cuda():
        if not machine.asks_gpu:
            return None
        free, whole = gpu_memory()
        words = f"free of {whole / 1e9:.1f} GB on the GPU of rank 0"
        return MemoryLimit(free, words, int(PART_TO_FILL * free))
    found = host_memory(machine.ranks if machine.is_this_one else 1)
    if found is None:
        return None
    size = found.free // machine.ranks
    share = f"a share of one of {machine.ranks} in " if machine.ranks > 1 else ""
    words = (
        f"{share}{found.free / 1e9:.2f} GB that are free of {found.size / 1e9:.2f} GB of "
        f"{found.source}"
    )
    return MemoryLimit(size, words, None, machine.is_this_one)
