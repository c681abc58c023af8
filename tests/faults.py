"""Faults to start a command with (`launcher.start(..., before=...)`): something happens in one rank
when a function of the package is called for the n-th time."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial

# Where a rank is when it calls this: (module, class or None, function).
POINTS: dict[str, tuple[str, str | None, str]] = {
    "start": ("parallel_clip.training.lease", "LeaseToken", "wait_until_seen"),
    "data": ("parallel_clip.training.sample_log", "SampleLog", "own_counts"),
    "forward": ("parallel_clip.pipeline.forward_backward", "TwoPassStep", "first_pass"),
    "backward": ("parallel_clip.pipeline.forward_backward", "TwoPassStep", "second_pass"),
    "clip": ("parallel_clip.optimizer.adamw", "MegatronAdamW", "squared_gradient_norm"),
    "update": ("parallel_clip.optimizer.adamw", "MegatronAdamW", "update"),
    "save": ("parallel_clip.checkpoint.checkpointer", "Checkpointer", "save"),
    "collect": ("parallel_clip.checkpoint.checkpointer", None, "collect_pieces"),
    "write": ("parallel_clip.checkpoint.durable", None, "write_new"),
    "rename": ("parallel_clip.checkpoint.commit", None, "commit"),
    "evaluate": ("parallel_clip.evaluate.encoder", "ModelEncoder", "encode_text"),
}

Fault = Callable[[int], None]


def fault(point: str, call: int, rank: int, action: Callable[..., None], *also: Fault) -> Fault:
    """Do `action` in `rank` before the `call`-th call of `point`; action is given its arguments."""
    return partial(_install, point, call, rank, action, also)


def _install(point: str, call: int, rank: int, action: Callable, also: tuple, own: int) -> None:
    for other in also:
        other(own)
    if own != rank:
        return
    module_name, class_name, name = POINTS[point]
    module = importlib.import_module(module_name)
    owner = module if class_name is None else getattr(module, class_name)
    original, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_process(*_) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_ever(*_) -> None:
    time.sleep(10_000)


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*_) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def user_signal(*_) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def terminate_twice(*_) -> None:
    terminate()
    time.sleep(0.2)
    terminate()


def disk_full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def io_error(*_) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "a file")


def spoil_gradient(optimizer) -> None:
    """NaN in one gradient of this rank."""
    parameter = next(p for p in optimizer.wrapped[0].parameters() if p.numel() > 100)
    parameter.main_grad.view(-1)[7] = float("nan")


def quick_lease(_: int) -> None:
    """A lease whose holder shows that it is alive every 0.2 s."""
    from parallel_clip.training import lease

    lease.BEAT_SECONDS = 0.2


def fault_in_save(point: str, save: int, rank: int, action: Callable[..., None]) -> Fault:
    """Do `action` in `rank` at the first call of `point` within the `save`-th save."""
    return partial(_install_in_save, point, save, rank, action)


def _install_in_save(point: str, save: int, rank: int, action: Callable, own: int) -> None:
    def arm(*_) -> None:
        _install(point, 1, rank, action, (), own)

    # Not where a save begins: it commits the one before first, if that is still being written.
    _install("collect", save, rank, arm, (), own)


def wait_for_takeover(folder, *_) -> None:
    """Until a file `takeover` lies in the run folder."""
    while not (folder.parents[1] / "takeover").exists():
        time.sleep(0.05)
