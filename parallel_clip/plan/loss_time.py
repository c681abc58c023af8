"""Seconds of the contrastive loss with its gradients, from what loss/infonce.py and loss/sigmoid.py
do: products, passes over the logits, and the exchange of texts. All of it in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel_clip.plan.kernel_time import Kernels

if TYPE_CHECKING:
    from parallel_clip.plan.collective_time import Routes
    from parallel_clip.plan.device_file import Device
    from parallel_clip.plan.layout_plan import LayoutPlan

# Numbers that are read and written for each logit, by exponentials and logarithms, and by all else.
INFONCE_PASSES = (8, 17)
SIGMOID_PASSES = (6, 16)


@dataclass(frozen=True)
class LossSeconds:
    compute: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.communication


def loss_seconds(plan: LayoutPlan, device: Device, routes: Routes) -> LossSeconds:
    """Of the ranks that hold the last stage; those of other stages work beside them or wait."""
    b, n, h, d = plan.batch.per_rank, plan.layout.data, plan.loss_helpers, plan.embed_dim
    kernels, exchange = Kernels(device, "fp32"), plan.exchange
    texts_of_rank = b * plan.batch.captions
    columns = texts_of_rank * n / h
    is_infonce = plan.loss.kind == "infonce"
    again = is_infonce and not exchange.stored  # the logits are computed a second time
    tiles = max(1.0, columns / exchange.tile)
    product = tiles * kernels.product(b, columns / tiles, d)
    exponentials, others = INFONCE_PASSES if is_infonce else SIGMOID_PASSES
    logits = b * columns
    compute = (3 + again) * product
    compute += kernels.activating(exponentials * logits) + kernels.streaming(others * logits)

    texts, features = 4 * columns * d, 4 * (b + texts_of_rank) * d
    communication = routes.data.all_gather(texts, n)  # texts, and their gradients back
    communication += routes.data.all_gather(texts, n)
    if again and not exchange.gathered:
        communication += routes.data.all_gather(texts, n)
    if is_infonce:  # maxima and sums, of texts over data ranks and of pictures over helpers
        communication += 2 * routes.data.all_reduce(4 * columns, n)
    helpers = routes.model if plan.loss_on_all_stages else routes.tensor
    if is_infonce:
        communication += 2 * helpers.all_reduce(4 * b, h)
    communication += helpers.all_reduce(features, h)
    if plan.loss_on_all_stages:
        communication += routes.pipeline.broadcast(features, plan.layout.pipeline)
    return LossSeconds(compute, communication)
