"""Which gradients travel between pipeline stages: none where nothing in front is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from parallel_clip.engine.groups import schedule_groups
from parallel_clip.model.clip import CLIPModel


def gradient_messages(chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """The arguments by which megatron-core's schedule leaves out gradients that nobody wants; none
    where every stage wants its own.

    With virtual stages a message does not say of which one it is: there every gradient travels, and
    one that nobody wants is zeros (`CLIPModel.forward`).
    """
    model: CLIPModel = chunks[0].module
    if len(chunks) > 1 or all(model.wants_gradient(s) for s in model.stages[1:]):
        return {}
    groups = schedule_groups()
    return {"p2p_communicator": _Communicator(groups.pp, model), "pg_collection": groups}


class _Communicator(P2PCommunicator):
    """Of one rank, with one stage."""

    def __init__(self, pipeline_group, model: CLIPModel):
        super().__init__(pipeline_group, model.config)
        stages, number = model.stages, model.stage.number
        self._sends_gradient = not model.stage.is_first and model.wants_gradient(model.stage)
        self._gets_gradient = not model.stage.is_last and model.wants_gradient(stages[number + 1])

    def _communicate(
        self, *, tensor_send_prev: Tensor | None, recv_next: bool, **others: Any
    ) -> tuple:
        return super()._communicate(
            tensor_send_prev=tensor_send_prev if self._sends_gradient else None,
            recv_next=recv_next and self._gets_gradient,
            **others,
        )
