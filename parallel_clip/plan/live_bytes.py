"""Counts the bytes of tensors that are alive, and the most that ever were at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context in which the memory behind every tensor that an operation makes is counted from
    then until it is freed: each piece once, however many tensors look at it.

    Works alike on real and on fake tensors, inside of whose mode it is to be entered. What kernels
    and libraries allocate for themselves is not seen. now: bytes alive; peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the identity of a piece
        self._patch = None

    @contextmanager
    def peak_of(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Note in `peaks` the most bytes alive at once meanwhile."""
        before, self.peak = self.peak, self.now
        try:
            yield
        finally:
            peaks[name] = max(peaks.get(name, 0), self.peak)
            self.peak = max(before, self.peak)

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            # How activations that are to be computed again are freed: no operation does it.
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", noted)
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        piece, size = storage._cdata, storage.nbytes()
        if piece not in self._sizes:
            weakref.finalize(storage, self._forget, piece).atexit = False
        if self._sizes.get(piece) != size:
            self._set(piece, size)

    def _set(self, piece: int, size: int) -> None:
        self.now += size - self._sizes.get(piece, 0)
        self._sizes[piece] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, piece: int) -> None:
        self.now -= self._sizes.pop(piece)
