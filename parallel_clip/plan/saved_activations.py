"""Counts the bytes that a forward pass keeps for its backward pass."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SavedActivations:
    """A context in which every tensor that autograd keeps is counted, once per piece of memory.

    Several tensors may be views of one piece; it counts in full, since all of it stays allocated.
    The tensors in `excluded`, such as the parameters and the input, do not count. Each piece is put
    down to the innermost submodule of `model` that was running when it was first kept; layers of a
    stack are taken together. Works alike on real and on fake tensors.
    """

    def __init__(self, model: nn.Module, excluded: Iterable[Tensor] = ()):
        self._model = model
        self._excluded = {storage_id(tensor) for tensor in (*model.parameters(), *excluded)}
        self._kept: dict[int, tuple[str, torch.UntypedStorage]] = {}
        self._seen: set[int] = set()
        self._running: list[str] = []
        self._hooks: list = []
        self.by_module: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.by_module.values())

    def was_kept(self, tensor: Tensor) -> bool:
        """Whether the memory behind a tensor was kept, be it excluded or not."""
        return storage_id(tensor) in self._seen

    def __enter__(self) -> "SavedActivations":
        for name, module in self._model.named_modules():
            kind = re.sub(r"\.\d+(?=\.|$)", "", name)
            self._hooks += [
                module.register_forward_pre_hook(lambda *_, kind=kind: self._running.append(kind)),
                module.register_forward_hook(lambda *_: self._leave()),
            ]
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._saving.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        # Asked for only now: selective recompute frees memory after it has been kept.
        for kind, storage in self._kept.values():
            self.by_module[kind] = self.by_module.get(kind, 0) + storage.nbytes()

    def _keep(self, tensor: Tensor) -> Tensor:
        memory = storage_id(tensor)
        self._seen.add(memory)
        if memory not in self._excluded and memory not in self._kept:
            kind = self._running[-1] if self._running else ""
            self._kept[memory] = (kind, tensor.untyped_storage())
        return tensor

    def _leave(self) -> None:
        self._running.pop()


def storage_id(tensor: Tensor) -> int:
    """The identity of the memory behind a tensor, which its views share."""
    return tensor.untyped_storage()._cdata
