"""A world of any size in one process: fake tensors in a fake process group.

Fake tensors have shapes and types and no values; the collectives of a fake process group return at
once. The code of a rank runs unchanged, in no memory and in hardly any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_clip.engine.groups import Groups, close_groups, join_world, make_groups
from parallel_clip.engine.launch import Launch
from parallel_clip.layout import Layout


@contextmanager
def fake_rank(layout: Layout, rank: int = 0) -> Iterator[Groups]:
    """Make this process `rank` of a world of the layout's size. Inside, every new tensor is fake.

    Raises RuntimeError in a process that has joined a process group: it cannot be two ranks.
    """
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that has joined no process group")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    try:
        join_world(Launch(rank, 0, layout.world))
        groups = make_groups(layout)
        with (
            mock.patch.object(dist, "all_gather_object", fake_all_gather_object),
            # The state of a generator has no fake, and nothing in the model is random.
            mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: nullcontext()),
            # Fake memory has nothing to copy, and the mode would never let go of both pieces.
            mock.patch.object(torch.UntypedStorage, "copy_", lambda storage, *_: storage),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield groups
    finally:
        close_groups()


class FakeAnswers(TorchDispatchMode):
    """Answers what fake tensors cannot, so that a whole step runs on them: the host reads 0 of any,
    and collectives of several tensors at once return at once, like others of a fake world. To be
    entered inside of `fake_rank`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if function.namespace == "c10d" and "coalesced" in function.name():
            return FakeWork().boxed()
        return function(*args, **(kwargs or {}))


def fake_all_gather_object(answers: list, mine: object, group=None) -> None:
    """Stands in for `all_gather_object` where no other process is there to answer."""
    answers[:] = [mine] * len(answers)
