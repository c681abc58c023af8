"""The sigmoid loss of SigLIP: binary cross-entropy on each logit, 1 for pairs and 0 for others.

Zhai et al. (2023), "Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343).

A pair's term needs nothing of other pairs, so loss and gradients come out of one sweep over the
tiles of a rank's block of logits, [b, B]: three matrix products, and nothing is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_clip.loss.contrastive import ContrastiveLoss, Gradients, LossCall
from parallel_clip.loss.duplicates import LEFT_OUT
from parallel_clip.loss.exchange import TextShards, sum_over


class SigLipLoss(ContrastiveLoss):
    """The sum of -log sigmoid over all pictures with all texts of the global batch, divided by the
    number of its texts, B·k; also where duplicates leave some out of the sum.

    Takes the place of `open_clip.SigLipLoss`; arguments and result are in `ContrastiveLoss`.
    """

    def _compute(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, call: LossCall
    ) -> tuple[Tensor, Gradients | None]:
        groups, pairs = call.groups, len(images)
        mine = groups.own_texts(pairs, self.captions)
        images = images.float()
        scaled = images * scale
        columns = TextShards(texts[mine], groups.data, call.plan, self.captions)

        grads = image_grads = text_grads = None
        if call.want_gradients:
            grads = images.new_zeros(pairs + len(texts), images.shape[1])
            image_grads, text_grads = grads[:pairs], grads[pairs:]
        totals = torch.zeros(3, dtype=torch.float64, device=images.device)  # loss, d bias, d scale
        for part in columns.chunks():
            chunk = columns.read(part)
            logits = scaled @ chunk.t()
            if bias is not None:
                logits += bias
            if call.duplicates is not None:
                logits.masked_fill_(call.duplicates.left_out(columns, part, mine), LEFT_OUT)
            columns.own_pairs(logits, part, mine).neg_()  # label +1 for own texts, -1 for others
            totals[0] += _softplus_total(logits)
            if grads is None:
                continue
            block = logits.sigmoid_()
            columns.own_pairs(block, part, mine).neg_()
            totals[1] += _total(block)
            image_grads.addmm_(block, chunk)
            del chunk  # nothing of a chunk outlives its use: they are the memory of this loss
            columns.accumulate_text_grad(part, block, scaled, text_grads[mine])
            del logits, block

        sum_over(totals, groups.helpers)
        if grads is not None:
            columns.finish(text_grads[mine])
            sum_over(grads, groups.helpers)
            totals[2] = (images * image_grads).sum(dtype=torch.float64)
        everyones_texts = len(texts) * groups.data_size
        value, bias_grad, scale_grad = sum_over(totals, groups.data) / everyones_texts
        if grads is None:
            return value, None
        # Times the number of ranks, as DDP takes the mean.
        image_grads *= scale / len(texts)
        text_grads /= len(texts)
        return value, Gradients(image_grads, text_grads, scale_grad, bias_grad)


# Factors 1 + exp(-|x|), at most 2 each, that share one logarithm: their product is at most 65,536.
_FACTORS_HALVED = 4


def _softplus_total(logits: Tensor) -> Tensor:
    """Σ log(1 + exp x) over all elements of `logits` [rows, columns], fp64 0-dim.

    A log1p takes a CPU ten times as long as an exp, so 16 factors are multiplied up first:
    (1 + u)(1 + v) = 1 + (u + v + uv). No term is negative, so nothing cancels, and the smallest u
    still counts.
    """
    above_zero = _total(logits.clamp(min=0))
    factors = logits.abs().neg_().exp_()
    for _ in range(_FACTORS_HALVED):
        half = -(-factors.shape[1] // 2)
        factors, others = factors[:, :half], factors[:, half:]
        paired = factors[:, : others.shape[1]]
        paired.addcmul_(paired, others).add_(others)
    return above_zero + _total(factors.log1p())


def _total(block: Tensor) -> Tensor:
    """The sum of all elements of [rows, columns], fp64 0-dim: in fp32 along rows, which takes no
    fp64 copy of the block."""
    return block.sum(dim=1).sum(dtype=torch.float64)
