"""What a rank's process fills beside its part of the training: estimates, by kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from parallel_clip.config import Config
from parallel_clip.data.feeding.loader import MAX_PIECE
from parallel_clip.engine.device import has_cuda

# Of the CUDA context, cuBLAS's and cuDNN's workspaces.
CONTEXT_BYTES = 800 << 20
# Of NCCL, for each process group of several ranks: with its default of 4 MiB a channel and
# connection (NCCL_BUFFSIZE) 16 channels to two neighbours take 128 MiB.
GROUP_BYTES = 128 << 20

# Of what comes and goes in a step; state is allocated once and leaves no gaps.
SLACK = 0.05

# On a CPU, resident: interpreter, torch, megatron-core and the rest of the package are 860 MiB
# before the first step (torch 2.14, 350 MiB of it code), what malloc and oneDNN keep is 0 to 300
# more. docs/planning.md has what it comes to.
CPU_BYTES = 920 << 20
# What a data worker, which is forked from the rank, holds of its own.
WORKER_BYTES = 130 << 20


@dataclass(frozen=True)
class RankProcess:
    """Bytes of a rank's process. base: of its device's context and libraries, or of all that is
    loaded on a CPU; group: of each process group of several ranks; worker: of a process that reads
    its data, 0 where that is in other memory; readers: how many there are; ready: microbatches of
    bytes that each keeps ready; slack: of the allocator, in parts of what comes and goes."""

    base: int
    group: int = 0
    worker: int = 0
    readers: int = 0
    ready: int = 0
    slack: float = SLACK

    def workers(self, pairs: int, image_size: tuple[int, int]) -> int:
        """All bytes of the processes that read data, in microbatches of `pairs`."""
        return self.readers * (
            self.worker + self.ready * min(pairs, MAX_PIECE) * 3 * prod(image_size)
        )


GPU_PROCESS = RankProcess(CONTEXT_BYTES, GROUP_BYTES)


def rank_process(config: Config) -> RankProcess:
    """That of a rank on this machine. `parallel.memory` is the rank's own: data workers are beside
    it, as beside a GPU's."""
    if has_cuda():
        return GPU_PROCESS
    data = config.data
    readers = data.workers if config.parallel.memory is None else 0
    size = 1 if data.normalize == "device" else 4
    return RankProcess(CPU_BYTES, 0, WORKER_BYTES, readers, data.prefetch * size)
