"""The only file that knows CPU from CUDA.

megatron-core is written for CUDA: it asks `torch.cuda` for the current device, for random-number
states and for streams, and creates tensors on `device="cuda"`. On a machine without CUDA the seam
below answers those questions with the CPU, so that the very code that runs on GPUs runs on gloo.
Where CUDA is, nothing here touches torch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import socket

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from parallel_clip.errors import InputError


def has_cuda() -> bool:
    return torch.cuda.is_available()


def prepare_device(local_rank: int) -> torch.device:
    """Make this process's device current and return it; without CUDA, put the seam in place.

    Where a process sees one GPU alone, it is that one: schedulers give each process its own.

    Raises:
        InputError: this machine has fewer GPUs than processes.
    """
    if has_cuda():
        seen = torch.cuda.device_count()
        if 1 < seen <= local_rank:
            raise InputError(
                f"process {local_rank + 1} of machine {host_name()} finds {seen} GPUs there, and "
                f"NCCL takes one process a GPU; start at most {seen} on a machine"
            )
        device = torch.device("cuda", min(local_rank, seen - 1))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; matrix products are so already
        return device
    _install_cpu_seam()
    return torch.device("cpu")


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def keep_random_state() -> contextlib.AbstractContextManager[None]:
    """Inside, random numbers may be drawn; afterwards torch's generators are as they were."""
    return torch.random.fork_rng([torch.cuda.current_device()] if has_cuda() else [])


def collective_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


def make_deterministic() -> None:
    """Only deterministic kernels from here on. On CPU every run already gives the same bits."""
    if has_cuda():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def claim_device(device: torch.device, store: dist.Store, rank: int) -> None:
    """Note in the job's store that this rank has its GPU, which no other rank may have.

    Raises:
        InputError: another rank has it.
    """
    name = f"gpu of {host_name()} {torch.cuda.get_device_properties(device).uuid}"
    holder = store.compare_set(name, "", str(rank)).decode()
    if holder != str(rank):
        raise InputError(
            f"ranks {holder} and {rank} both have GPU {device.index} of {host_name()}, and NCCL "
            "takes one process a GPU; start fewer on the machine, or give each its own "
            "(CUDA_VISIBLE_DEVICES)"
        )


class CopyStream:
    """Copies from page-locked memory to the device beside what runs there."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if has_cuda() else None

    def begin(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The copy, not to be used before `finish`; `tensor` itself where it is there."""
        if self._stream is None:
            return tensor.to(device)
        with torch.cuda.stream(self._stream):
            return tensor.to(device, non_blocking=True)

    def finish(self, copy: torch.Tensor) -> torch.Tensor:
        """Have what runs on the device from now on wait for the copies that have begun."""
        if self._stream is not None and copy.is_cuda:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            copy.record_stream(current)  # its memory was the other stream's
        return copy

    def copy_small(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy for which the host does not wait, from memory that is made page-locked for it."""
        if self._stream is None:
            return tensor.to(device)
        pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        return pinned.to(device, non_blocking=True)


def reset_peak_memory() -> None:
    """Count `peak_memory_bytes` anew; resident memory has no such count."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the device with CUDA, resident without."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give back what nothing refers to any more; hooks and what they belong to refer to one
    another."""
    gc.collect()
    if has_cuda():
        torch.cuda.empty_cache()


def gpu_memory() -> tuple[int, int] | None:
    """Bytes that this process can still fill on its GPU, and all of it; None without one."""
    return torch.cuda.mem_get_info() if has_cuda() else None


def synchronize() -> None:
    if has_cuda():
        torch.cuda.synchronize()


def host_name() -> str:
    return socket.gethostname()


def describe_device() -> str:
    return torch.cuda.get_device_name() if has_cuda() else "CPU"


# ------------------------------------------------------------------------------------ the seam


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"` is the CPU, `.cuda()` the identity, and `.type()` has a CUDA name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if function is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NoStream:
    """Stands in for `torch.cuda.Stream` and `Event`: on a CPU everything is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing


@functools.cache
def _install_cpu_seam() -> None:
    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.default_generators = (torch.default_generator,)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))

    # megatron-core binds its own names for these two at import.
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    # `with torch.device(...)` knows torch's factories by identity and looks them up at its first
    # use: it is to find them before they are wrapped.
    from torch.utils._device import _device_constructors

    _device_constructors()
    # A torch-function mode is off inside backward, where full recompute runs the forward again:
    # the factories it calls there are wrapped for good.
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _CudaMeansCpu().__enter__()  # for the life of the process


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return wrapped
