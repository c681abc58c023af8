"""Rank and world size of this process: from the environment that torchrun, srun or mpirun sets, or
a world of one."""

from __future__ import annotations

import os
import re
import subprocess
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from parallel_clip.errors import InputError


class _MpiNames(NamedTuple):
    rank: str
    local_rank: str
    size: str
    local_size: str


_MPI = [
    _MpiNames(
        *(f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
    ),
    _MpiNames("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
]


@dataclass(frozen=True)
class Launch:
    """Rank, rank on its machine, and number of the processes that were started together; and of
    those on a machine, None where the launcher does not say."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int | None = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def read_launch(environment: dict[str, str] | None = None) -> Launch:
    """Find the rank in `RANK`/`LOCAL_RANK`/`WORLD_SIZE` (torchrun), `SLURM_*` (srun), or in what
    Open MPI's (`OMPI_COMM_WORLD_*`) or MPICH's (`PMI_*`) mpirun sets.

    A SLURM batch script or `salloc` shell has SLURM variables but no task of its own: only a
    step that srun started with several tasks counts.
    """
    env = os.environ if environment is None else environment
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            rank = int(env["RANK"])
            local = int(env["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in env else None
            return Launch(rank, int(env.get("LOCAL_RANK", rank)), int(env["WORLD_SIZE"]), local)
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            rank = int(env["SLURM_PROCID"])
            # "8(x16)", or "8,4" of machines that differ
            local = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
            size = int(env["SLURM_STEP_NUM_TASKS"])
            return Launch(rank, int(env["SLURM_LOCALID"]), size, int(local[0]) if local else None)
        for names in _MPI:
            if int(env.get(names.size, 1)) > 1:
                return Launch(
                    int(env[names.rank]),
                    int(env[names.local_rank]),
                    int(env[names.size]),
                    int(env[names.local_size]) if names.local_size in env else None,
                )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the launch environment is not complete: {error}; start with torchrun or srun, "
            "or mpirun, which set RANK, LOCAL_RANK and WORLD_SIZE (or SLURM_PROCID, SLURM_LOCALID)"
        ) from None
    return Launch(0, 0, 1)


def set_rendezvous_address() -> None:
    """Give the processes of srun and mpirun what torchrun's have: MASTER_ADDR and MASTER_PORT.

    Under srun the first host of the step's node list serves; under mpirun this one, where all
    processes are on it. The port is derived from the job, so that two jobs on one host do not meet.

    Raises:
        InputError: the host of rank 0 is not known.
    """
    mpi = next((names for names in _MPI if int(os.environ.get(names.size, 1)) > 1), None)
    if "MASTER_ADDR" not in os.environ and mpi is not None:
        if os.environ.get(mpi.local_size) != os.environ[mpi.size]:
            raise InputError(
                "MASTER_ADDR is not set, and mpirun does not say where rank 0 runs; export "
                "MASTER_ADDR=<host of rank 0> to all processes (mpirun -x MASTER_ADDR)"
            )
        os.environ["MASTER_ADDR"] = "localhost"
        if "MASTER_PORT" not in os.environ:
            job = os.environ.get("PMIX_NAMESPACE", os.environ.get("PMI_ID", "")) or os.getppid()
            os.environ["MASTER_PORT"] = str(20000 + zlib.crc32(str(job).encode()) % 20000)
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"MASTER_ADDR is not set and `{' '.join(command)}` failed ({error}); "
                "export MASTER_ADDR=<host of rank 0> before srun"
            ) from None
        os.environ["MASTER_ADDR"] = hosts.split()[0]
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
