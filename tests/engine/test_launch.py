import os
import subprocess

import pytest

from parallel_clip.engine.launch import Launch, read_launch, set_rendezvous_address
from parallel_clip.errors import InputError

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
}


def test_alone():
    assert read_launch({}) == Launch(0, 0, 1)
    assert read_launch({}).is_rank_zero


def test_torchrun():
    assert read_launch(TORCHRUN) == Launch(5, 1, 8)
    assert not read_launch(TORCHRUN).is_rank_zero


def test_srun():
    assert read_launch(SRUN) == Launch(9, 1, 16)


def test_torchrun_under_srun_counts_torchruns_ranks():
    assert read_launch(SRUN | TORCHRUN) == Launch(5, 1, 8)


def test_a_shell_inside_a_job_is_a_process_alone():
    """`salloc` and batch scripts have the job's variables; the shell's own step has one task."""
    shell = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    assert read_launch(shell) == Launch(0, 0, 1)
    assert read_launch(shell | {"SLURM_STEP_NUM_TASKS": "1"}) == Launch(0, 0, 1)


@pytest.mark.parametrize(
    "environment",
    [TORCHRUN | {"RANK": "first"}, {k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}],
    ids=["not a number", "missing"],
)
def test_half_an_environment_is_refused(environment):
    with pytest.raises(InputError, match="torchrun or srun"):
        read_launch(environment)


@pytest.fixture
def slurm(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    asked = []

    def scontrol(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="gpu003\ngpu004\n")

    monkeypatch.setattr(subprocess, "run", scontrol)
    yield asked
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by the function, unseen by monkeypatch
        os.environ.pop(name, None)


def test_srun_meets_at_the_first_host(slurm):
    set_rendezvous_address()
    assert slurm == [["scontrol", "show", "hostnames", "gpu[003-004]"]]
    assert os.environ["MASTER_ADDR"] == "gpu003"
    first_port = int(os.environ.pop("MASTER_PORT"))
    assert 1024 < first_port < 65536
    os.environ["SLURM_JOB_ID"] = "12346"
    set_rendezvous_address()
    assert int(os.environ["MASTER_PORT"]) != first_port


def test_a_given_address_is_kept(slurm, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    set_rendezvous_address()
    assert not slurm
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_no_address_to_be_found(slurm, monkeypatch):
    def no_scontrol(command, **_):
        raise FileNotFoundError("no scontrol")

    monkeypatch.setattr(subprocess, "run", no_scontrol)
    with pytest.raises(InputError, match="export MASTER_ADDR"):
        set_rendezvous_address()


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
MPICH = {"PMI_RANK": "9", "MPI_LOCALRANKID": "1", "PMI_SIZE": "16", "MPI_LOCALNRANKS": "8"}


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun(environment, monkeypatch):
    assert read_launch(environment) == Launch(9, 1, 16, local_size=8)
    with pytest.raises(InputError, match="mpirun"):
        read_launch({k: v for k, v in environment.items() if "RANK" not in k or "LOCAL" in k})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR"):
        set_rendezvous_address()
    monkeypatch.setenv(
        next(n for n in environment if "LOCAL" in n and "SIZE" in n or "NRANKS" in n), "16"
    )
    set_rendezvous_address()
    assert os.environ["MASTER_ADDR"] == "localhost" and int(os.environ["MASTER_PORT"]) >= 20000


def test_a_process_alone_under_mpirun_is_a_world_of_one():
    assert read_launch(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}) == Launch(0, 0, 1)
