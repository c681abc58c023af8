"""Where the right answer stands among all answers, and how often that is high enough.

Every function works through its queries in tiles, so that the whole matrix of scores, queries x
candidates, is never held.

A rank counts the candidates that stand before the right one. Of equal scores the lower index
stands first, as in a stable sort: features that are all equal score as chance does, and a score
that is not a number is never a hit.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE_SCORES = 2**23
"""Scores held at once: 32 MiB in fp32, and about twice that beside it to compare them."""


def image_to_text_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """For each picture, how many captions stand before the best one of its own.

    images [N, D] and texts [M, D]: fp32 features; owner [M] int64: the picture of each caption,
    of which every picture has at least one. Returns [N] int64.
    """

    def best_of_own(scores: Tensor, rows: slice) -> Tensor:
        picture = torch.arange(rows.start, rows.stop, device=scores.device)
        own = owner[None, :] == picture[:, None]
        return scores.masked_fill(~own, -torch.inf).argmax(dim=1)

    return _ranks(images, texts, best_of_own)


def text_to_image_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """For each caption, how many pictures stand before its own. Returns [M] int64."""
    return _ranks(texts, images, lambda scores, rows: owner[rows])


def class_ranks(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """For each picture, how many classes stand before its label.

    images [N, D] and classes [C, D]: fp32 features; labels [N] int64. Returns [N] int64.
    """
    return _ranks(images, classes, lambda scores, rows: labels[rows])


def recall(ranks: Tensor, k: int) -> float:
    """The share of ranks among the first k, from 0 to 1."""
    return (ranks < k).sum().item() / ranks.numel()


def _ranks(queries: Tensor, candidates: Tensor, right: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Ranks [N] of the candidates that `right` picks, given the scores of some rows of queries.

    The score of the right candidate is read from the tile itself: computed apart it could differ
    in the last bit, and would then stand before or behind itself.
    """
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    position = torch.arange(len(candidates), device=queries.device)
    for rows in _tiles(len(queries), len(candidates)):
        scores = queries[rows] @ candidates.T
        chosen = right(scores, rows)[:, None]
        score = scores.gather(1, chosen)
        before = ~(scores <= score)  # not `>`, which is false where there is no number
        before |= (scores == score) & (position < chosen)
        ranks[rows] = before.sum(dim=1)
    return ranks


def _tiles(queries: int, candidates: int) -> Iterator[slice]:
    height = max(1, TILE_SCORES // max(1, candidates))
    for start in range(0, queries, height):
        yield slice(start, min(start + height, queries))
