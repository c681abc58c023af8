"""Which device a process takes; the CPU seam leaves what is not CUDA's business as torch has it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel_clip.engine import device as device_seam
from parallel_clip.engine.error_report import is_lost_connection
from parallel_clip.errors import InputError

SCRIPT = """
import torch
from parallel_clip.engine.device import prepare_device

prepare_device(0)
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(2).cuda().device.type == "cpu"
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
    assert torch.nn.Linear(2, 2).weight.device.type == "meta"
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no seam where CUDA is")
def test_cuda_means_cpu_and_meta_stays_meta():
    """In a process of its own: elsewhere torch may have looked its factories up already."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has GPUs; which is current is noted."""
    chosen = []
    monkeypatch.setattr(device_seam, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"U{device.index}")
    )
    return chosen


@pytest.mark.parametrize("seen, local_rank, index", [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 5, 0)])
def test_a_process_takes_the_gpu_of_its_place_or_the_only_one(
    gpus, monkeypatch, seen, local_rank, index
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert device_seam.prepare_device(local_rank) == torch.device("cuda", index)
    assert gpus == [torch.device("cuda", index)]


def test_more_processes_than_gpus_are_refused(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="process 5 of machine .* finds 4 GPUs .* at most 4"):
        device_seam.prepare_device(4)


def test_two_ranks_on_one_gpu_are_named(gpus):
    store = dist.HashStore()
    device_seam.claim_device(torch.device("cuda", 0), store, 3)
    device_seam.claim_device(torch.device("cuda", 0), store, 3)  # again, as after a restart
    device_seam.claim_device(torch.device("cuda", 1), store, 4)
    with pytest.raises(InputError, match="ranks 3 and 7 both have GPU 0"):
        device_seam.claim_device(torch.device("cuda", 0), store, 7)


@pytest.mark.parametrize(
    "words",
    [
        "[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1234",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process",
        "NCCL communicator was aborted on rank 3.",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=42)",
    ],
)
def test_what_backends_say_of_a_lost_peer_is_known(words):
    assert is_lost_connection(RuntimeError(words))
    assert not is_lost_connection(RuntimeError("CUDA error: an illegal memory access"))
