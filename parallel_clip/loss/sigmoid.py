"""The sigmoid loss of SigLIP: every pair of a picture and a text is a yes-or-no question.

Zhai et al. (2023), "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel_clip.loss.exchange import (
    default_group,
    gather_with_gradient,
    group_rank,
    mean_over_ranks,
)


class SigLipLoss(nn.Module):
    """The sum of -log sigmoid over all pairs of the global batch, divided by its size.

    group: as in `ClipLoss`.
    """

    def __init__(self, group: ProcessGroup | None = None):
        super().__init__()
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Arguments, result and gradients as in `ClipLoss.forward`."""
        group = self.group or default_group()
        images = image_features.float()
        all_texts = gather_with_gradient(text_features.float(), group)
        bias = 0.0 if logit_bias is None else logit_bias
        logits = logit_scale * images @ all_texts.t() + bias

        matches = torch.full_like(logits, -1)  # +1 where picture and text belong together
        matches.diagonal(offset=group_rank(group) * len(images)).fill_(1)
        loss = mean_over_ranks(-F.logsigmoid(matches * logits).sum() / len(images), group)
        return {"contrastive_loss": loss} if output_dict else loss
