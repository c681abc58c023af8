"""The InfoNCE loss of CLIP: each picture against all texts, each text against all pictures.

Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision".

A rank's pictures with all texts make one block of logits, z = s · I Tᵀ, [b, B], and it serves both
directions. Its rows are whole, so the log-sum-exp of a picture's logits needs no other rank; that
of a text's is put together over ranks from [B] maxima and sums. With
G = exp(z - row) + exp(z - column) - 2 (the diagonal), the gradients are dI = s/2B · G T, here, and
dT = s/2B · Gᵀ I, summed over ranks. So only texts travel, and the block costs three matrix products
where it is kept and four where it is computed again, tile by tile.

With k texts a picture the block is [b, B·k], and k of a picture's logits are its own: the target of
each is 1/k in its row and 1 in its column, and the loss is half the mean over the B rows and half
that over the B·k columns. So G = exp(z - row) + 1/k exp(z - column) - 2/k (own).

Logits that duplicates leave out are so low that every exponential of theirs is 0. Label smoothing e
makes own targets 1 - e of what they were, and takes off G what it spreads (smoothing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.loss.contrastive import ContrastiveLoss, Gradients, LossCall
from parallel_clip.loss.duplicates import LEFT_OUT, Duplicates
from parallel_clip.loss.exchange import LossGroups, TextShards, max_over, sum_over
from parallel_clip.loss.smoothing import LabelSmoothing


class ClipLoss(ContrastiveLoss):
    """InfoNCE of the whole global batch, from each data-parallel rank's own pairs.

    Takes the place of `open_clip.ClipLoss`; arguments and result are in `ContrastiveLoss`. A
    `logit_bias` moves all logits alike: neither loss nor gradients see it.

    label_smoothing: as in torch's `cross_entropy`, in both directions: this part of each target is
    spread evenly over all logits of its row or column that take part, its pair's included.

    Raises:
        ValueError: `label_smoothing` is not in [0, 1); as `ContrastiveLoss` does.
    """

    def __init__(self, *arguments: Any, label_smoothing: float = 0.0, **options: Any):
        super().__init__(*arguments, **options)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing}: expected 0 or more, below 1")
        self.label_smoothing = label_smoothing

    def _compute(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, call: LossCall
    ) -> tuple[Tensor, Gradients | None]:
        groups, pairs, captions = call.groups, len(images), self.captions
        mine, global_batch = groups.own_texts(pairs, captions), pairs * groups.data_size
        images = images.float()
        scaled = images * scale
        columns = TextShards(texts[mine], groups.data, call.plan, captions)
        smoothing, duplicates = None, call.duplicates
        if self.label_smoothing:
            smoothing = LabelSmoothing(self.label_smoothing, global_batch, captions, duplicates)
        own_target = (1 - self.label_smoothing) / captions
        block = _Block(scaled, columns, mine, groups, duplicates, smoothing, own_target)

        kept: list[Tensor] | None = [] if call.plan.stored and call.want_gradients else None
        of_rows, of_columns, target = _log_sum_exp(block, kept)
        of_helper = torch.stack([target, of_columns.total() / captions])
        target, column_total = sum_over(of_helper, groups.helpers)
        row_total = of_rows.total() - 2 * target
        if not call.want_gradients:
            return (sum_over(row_total, groups.data) + column_total) / (2 * global_batch), None

        grads = _unscaled_gradients(block, len(texts), of_rows, of_columns, kept)
        image_grads, text_grads = grads[:pairs], grads[pairs:]
        along = (images * image_grads).sum(dtype=torch.float64)
        row_total, along = sum_over(torch.stack([row_total, along]), groups.data)
        # Times the number of ranks, as DDP takes the mean.
        image_grads *= scale / (2 * pairs)
        text_grads /= 2 * pairs
        scale_grad = along / (2 * global_batch)
        gradients = Gradients(image_grads, text_grads, scale_grad, torch.zeros_like(scale_grad))
        return (row_total + column_total) / (2 * global_batch), gradients


@dataclass(frozen=True)
class _Block:
    """A rank's pictures, `scaled` [b, D], with this helper's texts of all ranks.

    mine: which of this rank's texts the helper works on; own_target: the part of a row's target
    that goes to each of its own texts.
    """

    scaled: Tensor
    columns: TextShards
    mine: slice
    groups: LossGroups
    duplicates: Duplicates | None
    smoothing: LabelSmoothing | None
    own_target: float

    def left_out(self, part: slice) -> Tensor | None:
        """Which logits of a chunk take no part: bool [b, columns]; None: all do."""
        if self.duplicates is None:
            return None
        return self.duplicates.left_out(self.columns, part, self.mine)


def _unscaled_gradients(
    block: _Block,
    texts: int,
    of_rows: _LogSumExp,
    of_columns: _LogSumExp,
    kept: list[Tensor] | None,
) -> Tensor:
    """G T and Gᵀ (s I) of this rank's pictures and `texts` texts, summed over ranks,
    [b + b·k, D]. Takes the logits from `kept`, where they are; writes over the log-sum-exps."""
    scaled, columns, mine = block.scaled, block.columns, block.mine
    grads = scaled.new_zeros(len(scaled) + texts, scaled.shape[1])
    image_grads, text_grads = grads[: len(scaled)], grads[len(scaled) :]
    row_shares = of_rows.sums.reciprocal_()
    column_shares = of_columns.sums.mul_(columns.captions).reciprocal_()
    for number, part in enumerate(columns.chunks()):
        chunk, at = columns.read(part), columns.columns(part)
        left_out = block.left_out(part) if kept is None or block.smoothing else None
        if kept is None:
            logits = scaled @ chunk.t()
            if left_out is not None:
                logits.masked_fill_(left_out, LEFT_OUT)
        else:
            logits, kept[number] = kept[number], None
        grad = torch.sub(logits, of_rows.highest[:, None]).exp_().mul_(row_shares[:, None])
        grad.addcmul_(logits.sub_(of_columns.highest[at]).exp_(), column_shares[at])
        del logits  # nothing of a chunk outlives its use: they are the memory of this loss
        if block.smoothing is not None:
            block.smoothing.subtract_from(grad, columns, part, left_out)
        del left_out
        columns.own_pairs(grad, part, mine).sub_(2 * block.own_target)
        image_grads.addmm_(grad, chunk)
        del chunk
        columns.accumulate_text_grad(part, grad, scaled, text_grads[mine])
        del grad
    columns.finish(text_grads[mine])
    return sum_over(grads, block.groups.helpers)


class _LogSumExp(NamedTuple):
    """log Σ exp z = highest + log sums. The two stay apart: where a pair's own logit towers above
    the others, the loss and 1 - p are far below what fp32 can tell of `highest` itself."""

    highest: Tensor
    sums: Tensor

    def total(self) -> Tensor:
        return (self.highest.double() + self.sums.double().log()).sum()


def _log_sum_exp(block: _Block, kept: list[Tensor] | None) -> tuple[_LogSumExp, _LogSumExp, Tensor]:
    """Of the rows [b] and of this helper's columns [N·n], over all ranks, and half the sum of this
    rank's logits among them times their targets in both directions, fp64: without smoothing, of the
    logits of its pictures with their own texts.

    Maxima and sums of exponentials above them are carried from chunk to chunk, so that nothing
    overflows at any multiplier. `kept` takes the logits.
    """
    scaled, columns, mine = block.scaled, block.columns, block.mine
    row_max = scaled.new_full((len(scaled),), -torch.inf)
    row_sum = torch.zeros_like(row_max)
    column_max = scaled.new_empty(columns.count)
    column_sum = torch.empty_like(column_max)
    own, spread = torch.zeros(2, dtype=torch.float64, device=scaled.device)
    for part in columns.chunks():
        logits, at = scaled @ columns.read(part).t(), columns.columns(part)
        own += columns.own_pairs(logits, part, mine).sum(dtype=torch.float64)
        left_out = block.left_out(part)
        if block.smoothing is not None:
            spread += block.smoothing.spread_over(logits, columns, part, left_out)
        if left_out is not None:
            logits.masked_fill_(left_out, LEFT_OUT)
        del left_out
        new_max = torch.maximum(row_max, logits.amax(dim=1))
        above = torch.sub(logits, new_max[:, None]).exp_()
        row_sum = row_sum * torch.exp(row_max - new_max) + above.sum(dim=1)
        row_max = new_max
        column_max[at] = logits.amax(dim=0)
        torch.sub(logits, column_max[at], out=above).exp_()
        column_sum[at] = above.sum(dim=0)
        if kept is not None:
            kept.append(logits)
        del logits, above
    of_rows = _combine(row_max, row_sum, block.groups.helpers)
    of_columns = _combine(column_max, column_sum, block.groups.data)
    return of_rows, of_columns, block.own_target * own + spread / 2


def _combine(maxima: Tensor, sums: Tensor, group: ProcessGroup | None) -> _LogSumExp:
    """Over the ranks of a group, from each rank's maxima and sums above them."""
    highest = max_over(maxima.clone(), group)
    return _LogSumExp(highest, sum_over(sums * torch.exp(maxima - highest), group))
