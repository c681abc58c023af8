"""The InfoNCE loss of CLIP: each picture against all texts, each text against all pictures.

Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision".
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


class ClipLoss(nn.Module):
    """InfoNCE of the whole global batch, from each data-parallel rank's own pairs.

    group: the data-parallel ranks; None: all processes, or this one where it runs alone. Every
    rank must hold the same number of pairs.
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
        """The loss, the same on every rank; DDP's mean of the gradients is the full-batch gradient.

        image_features, text_features: [b, D], normalised, row i of each a pair.
        logit_scale: the multiplier itself; logit_bias: added to every logit.
        Logits and log-sum-exp are fp32 whatever the features' dtype.
        """
        group = self.group or default_group()
        images, texts = image_features.float(), text_features.float()
        all_images = gather_with_gradient(images, group)
        all_texts = gather_with_gradient(texts, group)
        bias = 0.0 if logit_bias is None else logit_bias

        own = torch.arange(len(images), device=images.device) + group_rank(group) * len(images)
        image_to_text = F.cross_entropy(logit_scale * images @ all_texts.t() + bias, own)
        text_to_image = F.cross_entropy(logit_scale * texts @ all_images.t() + bias, own)
        loss = mean_over_ranks((image_to_text + text_to_image) / 2, group)
        return {"contrastive_loss": loss} if output_dict else loss
