"""The multiplier and the bias, which only the last stage holds, on every stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup

from parallel_clip.engine.collectives import broadcast_from_last_stage
from parallel_clip.model.clip import CLIPModel


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
    multiplier, bias = broadcast_from_last_stage(known, pipeline_group).tolist()
    return multiplier, bias if has_bias else None
