"""Rank and world size of this process: from torchrun's environment, SLURM's, or a world of one."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from parallel_clip.errors import InputError


@dataclass(frozen=True)
class Launch:
    """Rank, rank on its machine, and number of the processes that were started together."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def read_launch(environment: dict[str, str] | None = None) -> Launch:
    """Find the rank in `RANK`/`LOCAL_RANK`/`WORLD_SIZE` (torchrun) or `SLURM_*` (srun).

    A SLURM batch script or `salloc` shell has SLURM variables but no task of its own: only a
    step that srun started with several tasks counts.
    """
    env = os.environ if environment is None else environment
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            rank = int(env["RANK"])
            return Launch(rank, int(env.get("LOCAL_RANK", rank)), int(env["WORLD_SIZE"]))
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            rank = int(env["SLURM_PROCID"])
            return Launch(rank, int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"]))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"the launch environment is not complete: {error}; start with torchrun or srun, which "
            "set RANK, LOCAL_RANK and WORLD_SIZE (or SLURM_PROCID, SLURM_LOCALID)"
        ) from None
    return Launch(0, 0, 1)


def set_rendezvous_address() -> None:
    """Give srun's processes what torchrun's have: MASTER_ADDR and MASTER_PORT.

    The first host of the step's node list serves; the port is derived from the job's number, so
    that two jobs on one host do not meet.
    """
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
