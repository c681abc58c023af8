"""Exchange of texts, and of the gradients of texts, between the ranks of a loss.

N data-parallel ranks hold b pictures each, B = N·b in all, each picture with k texts: text row
i·k + j is text j of picture i. Ranks that hold the same pictures, as tensor ranks do, are helpers
of one another: each works on n = b·k / H of every rank's texts, all those of a picture on one. D is
the embedding width, c the rows of a chunk that a rank gives of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel_clip.loss.exchange_plan import ExchangePlan

# The names since torch 2.14, which warns of the older ones.
_new_names = hasattr(dist, "all_gather_single")
all_gather_single = dist.all_gather_single if _new_names else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _new_names else dist.reduce_scatter_tensor


@dataclass(frozen=True)
class LossGroups:
    """The process groups of a loss; None: this process alone."""

    data: ProcessGroup | None = None
    helpers: ProcessGroup | None = None

    @property
    def data_size(self) -> int:
        return _size(self.data)

    @property
    def data_rank(self) -> int:
        return _rank(self.data)

    @property
    def helper_size(self) -> int:
        return _size(self.helpers)

    def own_texts(self, pairs: int, captions: int) -> slice:
        """Which of the texts of each rank's `pairs` pictures this helper works on."""
        rank, size = _rank(self.helpers), self.helper_size
        first, stop = pairs * rank // size, pairs * (rank + 1) // size
        return slice(captions * first, captions * stop)


class TextShards:
    """This helper's texts of all ranks, read in chunks, and the sum of their gradients.

    own: [n, D], this rank's; group: the data-parallel ranks; captions: k. Where all texts are held,
    rank by rank, a chunk is some of them, in place; where they stream it is c rows of each rank,
    [N·c, D], rank by rank. A chunk has all k texts of its pictures.
    """

    def __init__(
        self, own: Tensor, group: ProcessGroup | None, plan: ExchangePlan, captions: int = 1
    ):
        self.own, self.group, self.captions = own.contiguous(), group, captions
        self.ranks = _size(group)
        self.count = self.ranks * len(own)  # N·n
        self.held = plan.gathered or self.ranks == 1
        self._rank = _rank(group)
        self._step = plan.tile
        if not self.held:
            self._step = captions * max(1, plan.tile // (self.ranks * captions))
        self._all = gather(self.own, group) if self.held else None
        self._all_grads: Tensor | None = None

    def chunks(self) -> Iterator[slice]:
        """The chunks, as rows of all texts or, where they stream, of `own`."""
        length = self.count if self.held else len(self.own)
        for start in range(0, length, self._step):
            yield slice(start, min(start + self._step, length))

    def columns(self, chunk: slice) -> slice:
        """A chunk's place among the `count` columns, in the order in which chunks are read."""
        if self.held:
            return chunk
        return slice(self.ranks * chunk.start, self.ranks * chunk.stop)

    def of_columns(self, values: Tensor, chunk: slice) -> Tensor:
        """Of a value for each of the `count` texts, rank by rank, those of a chunk's columns."""
        if self.held:
            return values[chunk]
        return values.view(self.ranks, -1)[:, chunk].flatten()

    def read(self, chunk: slice) -> Tensor:
        """The chunk's texts, fp32."""
        texts = self._all[chunk] if self.held else gather(self.own[chunk], self.group)
        return texts.float()

    def own_pairs(self, block: Tensor, chunk: slice, mine: slice) -> Tensor:
        """A view, [k, pictures], of the logits of pictures with their own texts in a chunk's block
        [b, columns], of this rank's texts `mine`; empty where the chunk has none of them."""
        rows = chunk
        column = self._rank * (chunk.stop - chunk.start)
        if self.held:
            first = self._rank * len(self.own)
            start, stop = (min(max(x - first, 0), len(self.own)) for x in (chunk.start, chunk.stop))
            rows, column = slice(start, stop), first + start - chunk.start
        texts = rows.stop - rows.start
        first, count = (mine.start + rows.start) // self.captions, texts // self.captions
        own = block[first : first + count, column : column + texts]
        return own.unflatten(1, (count, self.captions)).diagonal(dim1=0, dim2=1)

    def accumulate_text_grad(
        self, chunk: slice, block: Tensor, images: Tensor, own_grads: Tensor
    ) -> None:
        """Compute blockᵀ images, the gradients of a chunk's texts. Their sum over ranks is in
        `own_grads` [n, D] once this was called for all chunks and `finish` has been called."""
        if not self.held:
            own_grads[chunk] = _reduce_scatter(block.t() @ images, self.group)
            return
        if self._all_grads is None:
            shape = self.count, images.shape[1]
            self._all_grads = own_grads if self.ranks == 1 else images.new_empty(shape)
        torch.mm(block.t(), images, out=self._all_grads[chunk])

    def finish(self, own_grads: Tensor) -> None:
        """Write the sum over ranks into `own_grads` [n, D]."""
        if self._all_grads is not None and self.ranks > 1:  # a helper of few pairs may have no text
            self._all = None  # not needed any more
            own_grads.copy_(_reduce_scatter(self._all_grads, self.group))


def sum_over(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the group's ranks, in place."""
    if _size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def max_over(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest over the group's ranks, in place."""
    if _size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def gather(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """[c, D] of each rank -> [N·c, D]"""
    if _size(group) == 1:
        return rows
    gathered = rows.new_empty(group.size() * len(rows), rows.shape[1])
    all_gather_single(gathered, rows.contiguous(), group=group)
    return gathered


def _reduce_scatter(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """[N·c, D] on each rank -> the sum over ranks of this rank's c rows"""
    if _size(group) == 1:
        return rows
    own = rows.new_empty(len(rows) // group.size(), rows.shape[1])
    reduce_scatter_single(own, rows, group=group)
    return own
