"""What only the last stage has, brought to every stage that shares the model with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.model.clip import CLIPModel


def from_last_stage(values: Tensor, pipeline_group: ProcessGroup) -> Tensor:
    """The last stage's values in place of this rank's, which have their shape and type."""
    stages = pipeline_group.size()
    if stages > 1:
        dist.broadcast(values, dist.get_global_rank(pipeline_group, stages - 1), pipeline_group)
    return values


def read_logit_parameters(
    chunks: Sequence[CLIPModel], pipeline_group: ProcessGroup
) -> tuple[float, float | None]:
    """The multiplier itself and the bias, None where the model has none, on every stage."""
    last = chunks[-1]
    known = torch.zeros(2, device=next(last.parameters()).device)
    has_bias = last.architecture.init_logit_bias is not None
    if last.stage.is_last:
        known[0] = last.logit_scale.detach().exp()
        if has_bias:
            known[1] = last.logit_bias.detach()
    multiplier, bias = from_last_stage(known, pipeline_group).tolist()
    return multiplier, bias if has_bias else None
