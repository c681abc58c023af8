"""Process groups: the one place that touches megatron-core's global parallel state.

Everyone else is handed a `Groups`, or one process group of it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from parallel_clip.engine import device as device_seam
from parallel_clip.engine.collectives import raise_on_all_ranks
from parallel_clip.engine.launch import Launch
from parallel_clip.engine.quiet import silence_dependency_warnings
from parallel_clip.engine.rendezvous import job_store
from parallel_clip.errors import InputError
from parallel_clip.layout import Layout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

T = TypeVar("T")

# A rank that dies takes its job down at once, and one that hangs is named by the watchdog.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Groups:
    """This process's ranks in the layout, and its process group for each kind of parallelism."""

    layout: Layout
    rank: int
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup  # the ranks of one copy of the model: tensor × pipeline
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline.rank()

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this is the rank that reads for its copy of the model."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 alone; all ranks return its result or raise its InputError."""
        result = [self.run_on_all_ranks(lambda: function() if self.is_rank_zero else None)]
        if self.layout.world > 1:
            dist.broadcast_object_list(result, src=0, group=self.world)
        return result[0]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Run `function` on every rank; an InputError on any of them is raised on all."""
        with raise_on_all_ranks(self.world if self.layout.world > 1 else None):
            return function()


# Whether this process has been in a real process group.
_has_been_joined = False


def join_world(launch: Launch, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Prepare this process's device and join the process group of all ranks.

    timeout: of a collective, after which it fails.

    Raises:
        InputError: two processes of a machine have one GPU.
    """
    silence_dependency_warnings()
    device = device_seam.prepare_device(launch.local_rank)
    if dist.is_initialized():
        return
    global _has_been_joined
    _has_been_joined = True
    options = {"timeout": timeout}
    if device.type == "cuda":
        options["device_id"] = device
    if launch.world_size == 1:  # no port needed, so none can be taken
        store = dist.HashStore()
    else:
        store = dist.PrefixStore("process groups", job_store(launch))
        if device.type == "cuda":
            device_seam.claim_device(device, job_store(launch), launch.rank)
    dist.init_process_group(
        device_seam.collective_backend(),
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        **options,
    )


def make_groups(layout: Layout) -> Groups:
    """Cut the process group of all ranks, which this process has joined, into the layout's. Groups
    of this process that are cut so already are taken.

    Raises:
        InputError: this process has groups of another layout.
    """
    from megatron.core import parallel_state, tensor_parallel

    virtual = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            create_gloo_process_groups=False,
        )
        # TransformerBlock forks this tracker under sequence parallelism; nothing of ours draws
        # from it, and whoever else does in this process shall not notice.
        with device_seam.keep_random_state():
            tensor_parallel.model_parallel_cuda_manual_seed(0)
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    if found != (layout.tensor, layout.pipeline, virtual):
        raise InputError(
            f"this process has groups of tensor {found[0]}, pipeline {found[1]} already, not of "
            f"tensor {layout.tensor}, pipeline {layout.pipeline}; close_groups() ends them"
        )
    return Groups(
        layout=layout,
        rank=dist.get_rank(),
        world=dist.group.WORLD,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        device=device_seam.current_device(),
    )


def schedule_groups() -> ProcessGroupCollection:
    """What megatron-core's schedules take for themselves where they are handed no groups."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    return groups


def whole_model_groups() -> Groups:
    """Groups in which each process holds a whole model: those of a world of one, or of the world
    that the caller has joined. In such a world all processes call it together.

    Raises:
        InputError: this process has groups of another layout.
    """
    current = device_seam.current_device().index or 0
    join_world(Launch(rank=0, local_rank=current, world_size=1))  # joins none where one is joined
    return make_groups(Layout(dist.get_world_size()))


def has_joined() -> bool:
    """Whether this process is in a process group, so that it cannot be a rank of a fake world."""
    return dist.is_initialized()


def can_be_forked() -> bool:
    """Whether a process that is forked from this one may make groups. After real ones it may not:
    it would end megatron-core's last ones, which are kept, and wait for threads that it lacks."""
    return not _has_been_joined


def close_groups() -> None:
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
