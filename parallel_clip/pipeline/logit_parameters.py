"""The multiplier and the bias, which only the last stage holds, on every stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.model.clip import CLIPModel


def own_logit_parameters(chunks: Sequence[CLIPModel]) -> Tensor:
    """The multiplier itself and the bias (0 where the model has none), fp32 [2] on the device, if
    this rank has the last stage; else zeros."""
    last = chunks[-1]
    known = torch.zeros(2, device=next(last.parameters()).device)
    if last.stage.is_last:
        known[0] = last.logit_scale.detach().exp()
        if last.logit_bias is not None:
            known[1] = last.logit_bias.detach()
    return known


def shared_logit_parameters(
    chunks: Sequence[CLIPModel], pipeline_group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """The multiplier itself and the bias, None where the model has none, 0-dim on the device of
    every stage."""
    scale, bias = broadcast_from_last_stage(own_logit_parameters(chunks), pipeline_group)
    return scale, bias if chunks[-1].architecture.init_logit_bias is not None else None


def read_logit_parameters(
    chunks: Sequence[CLIPModel], pipeline_group: ProcessGroup
) -> tuple[float, float | None]:
    """`shared_logit_parameters` as numbers, for which the host waits."""
    scale, bias = shared_logit_parameters(chunks, pipeline_group)
    return scale.item(), None if bias is None else bias.item()
