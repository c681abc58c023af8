"""What ranks do in test_losses.py: a script of someone's own, with torch's DDP around a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from parallel_clip.engine.groups import Groups


class TwoLinears(nn.Module):
    """The smallest CLIP: a linear map for each kind of input, a multiplier and a bias."""

    def __init__(self, image_weight: Tensor, text_weight: Tensor, logit_bias: bool):
        super().__init__()
        self.image_weight = nn.Parameter(image_weight.clone())
        self.text_weight = nn.Parameter(text_weight.clone())
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if logit_bias else None

    def forward(self, images: Tensor, texts: Tensor) -> list[Tensor | None]:
        return [
            F.normalize(images @ self.image_weight, dim=-1),
            F.normalize(texts @ self.text_weight, dim=-1),
            self.logit_scale.exp(),
            self.logit_bias,
        ]


def gradients_under_ddp(
    groups: Groups,
    loss: type[nn.Module],
    model: TwoLinears,
    images: Tensor,
    texts: Tensor,
    ask_for_dictionary: bool,
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients as DDP leaves them; each rank has its chunk of the batch."""
    ranks, rank = groups.layout.data, groups.data_rank
    ddp = DistributedDataParallel(model)
    outputs = ddp(images.chunk(ranks)[rank], texts.chunk(ranks)[rank])
    value = loss()(*outputs, output_dict=ask_for_dictionary)
    if ask_for_dictionary:
        assert list(value) == ["contrastive_loss"]
        value = value["contrastive_loss"]
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


def in_half_precision(groups: Groups, loss: type[nn.Module], features: Tensor) -> tuple:
    """Loss, its dtype and the features' gradient dtype, for bf16 features."""
    mine = features.chunk(groups.layout.data)[groups.data_rank].bfloat16().requires_grad_()
    value = loss(groups.data)(mine, mine, torch.tensor(50.0), torch.tensor(-1.0))
    value.backward()
    return value.item(), value.dtype, mine.grad.dtype
