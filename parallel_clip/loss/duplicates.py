"""Pictures and texts that are not each other's negatives, by identities of the texts: one with that
of a picture's own text is no negative of the picture.

A caption or picture that occurs twice in a batch would be pushed away from itself. The logits of
its picture with the other's text, and the other way round, take no part in the loss. Only [B·k]
identities travel; which logits of a tile are meant is found from those of its rows and columns.

b pictures a rank with k texts each, B in all; a helper works on n of every rank's texts, N·n
columns.
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
    """The identities, int64, of a global batch in which two pictures share at least one.

    of_pictures: [b, k], of the texts of this rank's pictures; of_texts: [N·n], of this helper's
    columns, rank by rank; ascending: [B·k], of all texts; pictures: [B·k + 1], of the first so many
    of `ascending`, how many there are when each counts once for a picture.
    """

    of_pictures: Tensor
    of_texts: Tensor
    ascending: Tensor
    pictures: Tensor

    def left_out(self, texts: TextShards, chunk: slice, mine: slice) -> Tensor:
        """Which logits of a chunk's block take no part: bool [b, columns], as in `own_pairs`."""
        others = texts.of_columns(self.of_texts, chunk)
        first, *more = self.of_pictures.unsqueeze(2).unbind(1)
        same = first == others
        for own in more:
            same |= own == others
        texts.own_pairs(same, chunk, mine).fill_(False)
        return same

    def taking_part_in_rows(self) -> Tensor:
        """How many logits of each picture take part: fp32 [b]."""
        own = self.of_pictures.sort(dim=1).values
        first, end = self._found(own)
        same = end - first
        same[:, 1:].masked_fill_(own[:, 1:] == own[:, :-1], 0)  # counted already
        texts, captions = len(self.ascending), own.shape[1]
        return (texts + captions - same.sum(dim=1)).float()

    def taking_part_in_columns(self) -> Tensor:
        """How many logits of each text take part: fp32 [N·n]."""
        first, end = self._found(self.of_texts)
        pictures = len(self.ascending) // self.of_pictures.shape[1]
        return (pictures + 1 - (self.pictures[end] - self.pictures[first])).float()

    def _found(self, identities: Tensor) -> tuple[Tensor, Tensor]:
        """Where they begin and end in `ascending`."""
        first = torch.searchsorted(self.ascending, identities)
        return first, torch.searchsorted(self.ascending, identities, right=True)


def find_duplicates(identities: Tensor, groups: LossGroups, captions: int = 1) -> Duplicates | None:
    """Gather the identities of all texts, and see whether two pictures share any; None: they do
    not. The same answer on every rank; the host waits for it.

    identities: int64 [b·k], of this rank's texts, the same on helpers; captions: k.
    """
    everyones = gather(identities[:, None], groups.data).view(groups.data_size, -1)
    ascending, picture = everyones.flatten().sort(stable=True)
    picture.div_(captions, rounding_mode="floor")
    same = ascending[1:] == ascending[:-1]
    new_picture = picture[1:] != picture[:-1]
    if not (same & new_picture).any():
        return None
    first = torch.ones_like(ascending, dtype=torch.bool)  # of its identity in its picture
    torch.logical_or(~same, new_picture, out=first[1:])
    pictures = ascending.new_zeros(len(ascending) + 1)
    torch.cumsum(first, 0, dtype=pictures.dtype, out=pictures[1:])
    mine = groups.own_texts(len(identities) // captions, captions)
    of_pictures = identities.view(-1, captions)
    return Duplicates(of_pictures, everyones[:, mine].flatten(), ascending, pictures)
