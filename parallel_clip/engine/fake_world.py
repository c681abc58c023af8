"""A world of any size in one process: fake tensors in a fake process group.

Fake tensors have shapes and types and no values; the collectives of a fake process group return at
once. The code of a rank runs unchanged, in no memory and in hardly any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

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
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield groups
    finally:
        close_groups()


def fake_all_gather_object(answers: list, mine: object, group=None) -> None:
    """Stands in for `all_gather_object` where no other process is there to answer."""
    answers[:] = [mine] * len(answers)
