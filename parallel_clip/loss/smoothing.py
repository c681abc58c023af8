"""Label smoothing of InfoNCE: a part of each target is spread over all logits that take part.

Szegedy et al. (2016), "Rethinking the Inception Architecture for Computer Vision", as torch's
`cross_entropy(label_smoothing=e)` has it: of a row's target, 1 - e goes to its own texts and e / C
to each of the C logits that take part, its own among them. C is B·k, or what duplicates leave of
it; of a column it is B, and columns weigh 1 / k. A logit is in a row and in a column, so it is
pulled by e / C of both.

b pictures a rank with k texts each; a helper works on N·n columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_clip.loss.duplicates import Duplicates
from parallel_clip.loss.exchange import TextShards


class LabelSmoothing:
    """What is spread over a rank's block of logits.

    amount: e, above 0; pairs: B; captions: k.
    """

    def __init__(self, amount: float, pairs: int, captions: int, duplicates: Duplicates | None):
        self._both = 2 * amount / (pairs * captions)
        self._rows = self._columns = None  # of each, [b] and [N·n], where they differ
        if duplicates is not None:
            self._rows = amount / duplicates.taking_part_in_rows()
            self._columns = amount / captions / duplicates.taking_part_in_columns()

    def spread_over(
        self, logits: Tensor, texts: TextShards, chunk: slice, left_out: Tensor | None
    ) -> Tensor:
        """The sum of a chunk's logits [b, columns], each times what is spread over it; fp64 0-dim.
        Writes zeros over what is `left_out`."""
        if left_out is None:
            return self._both * logits.sum(dim=1).sum(dtype=torch.float64)
        logits.masked_fill_(left_out, 0)
        of_rows = (self._rows * logits.sum(dim=1)).sum(dtype=torch.float64)
        columns = texts.of_columns(self._columns, chunk)
        return of_rows + (columns * logits.sum(dim=0)).sum(dtype=torch.float64)

    def subtract_from(
        self, block: Tensor, texts: TextShards, chunk: slice, left_out: Tensor | None
    ) -> None:
        """Take what is spread off the gradient of a chunk's logits, [b, columns], in place."""
        if left_out is None:
            block.sub_(self._both)
            return
        block.sub_(self._rows[:, None]).sub_(texts.of_columns(self._columns, chunk))
        block.masked_fill_(left_out, 0)
