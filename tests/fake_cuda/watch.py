"""Counts what a step on fake CUDA tensors does that costs time on a real device.

Fake tensors have no numbers. Where code asks for one it is counted and gets a plausible answer: the
value that the tensor was made from, if it was made on the host, else 1.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
# They make a tensor or another look at one; no kernel runs. Views are known by their schema.
NO_KERNEL = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.set_, aten.resize_,
    aten.record_stream, aten._local_scalar_dense, aten.is_pinned,
}  # fmt: skip
# The first of these files on the stack says which part of a step a kernel outside of backward is.
AFTER_BACKWARD = "optimizer/adamw.py", "distributed/finalize_model_grads.py"
FEED = "training/feed.py"


@dataclass
class Counts:
    """What was done, by whom ("file:line < file:line", or a name): `reads` of device numbers by the
    host; `copies` between host and device that the host waits for, and `uploads`, from page-locked
    memory, that it does not; `waits` of the host for the device; `collectives`, and those `refused`
    by NCCL; `kernels` by part of the step."""

    reads: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


class Watch(TorchDispatchMode):
    """Counts what happens inside: `step` and, apart from it, what training/feed.py does.

    To be entered inside of a FakeTensorMode.
    """

    def __init__(self):
        super().__init__()
        self.step, self.feed = Counts(), Counts()
        self._patches = ExitStack()

    def __enter__(self) -> Watch:
        patch = mock.patch.object
        for patched in (
            patch(FakeTensor, "tolist", self._tolist),
            patch(torch, "tensor", self._tensor(torch.tensor)),
            patch(torch.cuda, "synchronize", self._wait("torch.cuda.synchronize")),
            patch(torch.cuda.Event, "synchronize", self._wait("Event.synchronize")),
            patch(torch.cuda.Stream, "synchronize", self._wait("Stream.synchronize")),
        ):
            self._patches.enter_context(patched)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.is_cuda for x in tensors)
        if on_device and _reads_numbers(function, args):
            self._count("reads")
            if function.overloadpacket is aten.nonzero:
                return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if function.overloadpacket is aten._local_scalar_dense:
            return _plausible(args[0])
        if function.namespace == "c10d":
            return self._collective(function, args, kwargs, tensors)
        result = function(*args, **kwargs)
        self._look_for_copies(function, tensors, result, args, kwargs)
        if _launches(function) and _on_device(result):
            self._counts().kernels[_part_of_step()] += 1
        return result

    # ---------------------------------------------------------------------------- what is counted

    def _counts(self) -> Counts:
        return self.feed if any(file.endswith(FEED) for file, _ in own_frames()) else self.step

    def _count(self, what: str, prefix: str = "") -> None:
        getattr(self._counts(), what)[prefix + caller()] += 1

    def _collective(self, function: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        self._counts().collectives[function.overloadpacket.__name__] += 1
        for tensor in tensors:
            if not tensor.is_cuda or not tensor.is_contiguous():
                self._count("refused", f"{function} of {tensor.device} {tuple(tensor.shape)}: ")
        if "coalesced" in function.name():  # it has no fake
            return FakeWork().boxed()
        return function(*args, **kwargs)

    def _look_for_copies(
        self, function: Any, tensors: list[Tensor], result: Any, args: tuple, kwargs: dict
    ) -> None:
        if function.overloadpacket is aten.lift_fresh:  # torch.tensor(numbers, device="cuda")
            if result.is_cuda:
                self._count("copies", "to cuda: ")
        elif function.overloadpacket in COPIES:
            source, target = tensors[-1], result
            if source.is_cuda == target.is_cuda:
                return
            asynchronous = kwargs.get("non_blocking", False) or args[2:3] == (True,)
            if target.is_cuda:
                uploaded = asynchronous and _is_pinned(source)
                self._count("uploads" if uploaded else "copies", "to cuda: ")
            else:
                self._count("copies", "to cpu: ")
                if not asynchronous:
                    self._count("reads")
        elif _on_device(result) and any(x.dim() and not x.is_cuda for x in tensors):
            self._count("copies", f"to cuda, for {function.overloadpacket.__name__}: ")

    # ----------------------------------------------------- what does not come by torch's dispatcher

    @property
    def _tolist(self) -> Callable[[FakeTensor], Any]:
        """One read of a whole tensor, as on a device; FakeTensor's own reads each number."""

        def tolist(tensor: FakeTensor) -> Any:
            if tensor.is_cuda:
                self._count("reads")
            answer = _plausible(tensor)
            for size in reversed(tensor.shape):
                answer = [answer] * size
            return answer

        return tolist

    def _tensor(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """torch.tensor reads the numbers of tensors in its data past all modes, where fake tensors
        have none."""

        def tensor(data: Any, **options: Any) -> Tensor:
            if isinstance(data, list | tuple):
                data = tree_map_only(Tensor, Tensor.item, data)
            return make(data, **options)

        return tensor

    def _wait(self, name: str) -> Callable[..., None]:
        return lambda *_: self._count("waits", f"{name}: ")


def own_frames() -> list[tuple[str, int]]:
    """File and line of what parallel_clip and megatron-core are at, the innermost first."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        file = _own_file(frame.f_code.co_filename)
        if file is not None:
            frames.append((file, frame.f_lineno))
        frame = frame.f_back
    return frames


@functools.cache
def _own_file(path: str) -> str | None:
    for package in ("/parallel_clip/", "/megatron/core/"):
        _, found, file = path.rpartition(package)
        if found:
            return package[1:] + file
    return None


def caller() -> str:
    """The innermost place, and the innermost in parallel_clip where that is another."""
    frames = own_frames()
    places = frames[:1] + [f for f in frames[1:] if f[0].startswith("parallel_clip/")][:1]
    return " < ".join(f"{file}:{line}" for file, line in places)


def _reads_numbers(function: Any, args: tuple) -> bool:
    tags = function.tags
    if function.overloadpacket is aten.index:  # only a mask has to be counted by the host
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _plausible(tensor: Tensor) -> bool | int | float:
    constant = getattr(tensor, "constant", None)
    if constant is not None and constant.numel() == 1:
        with torch._C._DisableTorchDispatch():
            return constant.item()
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _launches(function: Any) -> bool:
    return (
        function.namespace == "aten"
        and not function.is_view
        and function.overloadpacket not in NO_KERNEL
    )


def _on_device(result: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(result))


def _is_pinned(tensor: Tensor) -> bool:
    if isinstance(tensor, FakeTensor):
        return False
    with torch._C._DisableTorchDispatch():
        return tensor.is_pinned()


def _part_of_step() -> str:
    if torch._C._current_autograd_node() is not None:
        return "backward"
    after = any(file.endswith(AFTER_BACKWARD) for file, _ in own_frames())
    return "optimizer" if after else "forward"
