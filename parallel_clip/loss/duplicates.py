"""Pairs that are not each other's negatives: those of the global batch with equal identities.

A caption or picture that occurs twice in a batch would be pushed away from itself. The logits of
its picture with the other's text, and the other way round, take no part in the loss. Only [B]
identities travel; which logits of a tile are meant is found from those of its rows and columns.

b pairs a rank, B in all; a helper works on n of every rank's texts, N·n columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_clip.loss.exchange import LossGroups, TextShards, gather

# In the place of a logit that takes no part: e^(it - any maximum) and its sigmoid are 0. Unlike
# -inf it may itself be the maximum of a tile in which nothing takes part: what was summed there
# vanishes when the tile of the pair itself comes.
LEFT_OUT = -1e30


@dataclass(frozen=True)
class Duplicates:
    """The identities, int64, of a global batch in which at least one occurs twice.

    of_pictures: [b], of this rank's pairs; of_texts: [N·n], of this helper's columns, rank by rank;
    ascending: [B], of all pairs.
    """

    of_pictures: Tensor
    of_texts: Tensor
    ascending: Tensor

    def left_out(self, texts: TextShards, chunk: slice, mine: slice) -> Tensor:
        """Which logits of a chunk's block take no part: bool [b, columns], as in `own_pairs`."""
        others = texts.of_columns(self.of_texts, chunk)
        same = self.of_pictures[:, None] == others
        texts.own_pairs(same, chunk, mine).fill_(False)
        return same

    def taking_part(self, identities: Tensor) -> Tensor:
        """Of pairs with these identities, how many logits of their row, or column, take part: fp32,
        in the shape of `identities`."""
        first = torch.searchsorted(self.ascending, identities)
        end = torch.searchsorted(self.ascending, identities, right=True)
        return (len(self.ascending) + 1 - (end - first)).float()


def find_duplicates(identities: Tensor, groups: LossGroups) -> Duplicates | None:
    """Gather the identities of all pairs, and see whether any occurs twice; None: none does. The
    same answer on every rank; the host waits for it.

    identities: int64 [b], of this rank's pairs, the same on helpers.
    """
    everyones = gather(identities[:, None], groups.data).view(groups.data_size, -1)
    ascending = everyones.flatten().sort().values
    if not (ascending[1:] == ascending[:-1]).any():
        return None
    mine = groups.own_texts(len(identities))
    return Duplicates(identities, everyones[:, mine].flatten(), ascending)
