"""Ranks of the correct candidates by similarity, and recall at k.

Queries are scored in tiles, so that the whole matrix of scores, queries x candidates, is never
held.

A rank is the number of candidates that are ordered before the correct one. Of equal scores the
lower index comes first, as in a stable sort: features that are all equal score as chance does, and
a NaN score is never a hit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TILE_SCORES = 2**23
"""Scores in a tile: 32 MiB in fp32, and about twice that beside it to compare them."""


def image_to_text_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """The rank of each image's best own caption among all captions: int64 [N].

    images [N, D] and texts [M, D]: fp32 features; owner [M] int64: the image of each caption, at
    least one for every image.
    """

    def best_of_own(scores: Tensor, rows: slice) -> Tensor:
        picture = torch.arange(rows.start, rows.stop, device=scores.device)
        own = owner[None, :] == picture[:, None]
        return scores.masked_fill(~own, -torch.inf).argmax(dim=1)

    return _ranks(images, texts, best_of_own)


def text_to_image_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """The rank of each caption's image among all images: int64 [M]. Arguments as above."""
    return _ranks(texts, images, lambda scores, rows: owner[rows])


def class_ranks(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """The rank of each image's label among all classes: int64 [N].

    images [N, D] and classes [C, D]: fp32 features; labels [N] int64.
    """
    return _ranks(images, classes, lambda scores, rows: labels[rows])


def recall(ranks: Tensor, k: int) -> float:
    """The fraction of `ranks` below k, from 0 to 1."""
    return (ranks < k).sum().item() / ranks.numel()


def _ranks(
    queries: Tensor, candidates: Tensor, correct: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Ranks [N] of each query's correct candidate.

    correct: given a tile of scores and its rows of the queries, the index of each row's correct
    candidate. Its score is read from the tile itself: computed apart it could differ in the last
    bit, and the candidate would be ordered before or behind itself.
    """
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    position = torch.arange(len(candidates), device=queries.device)
    height = max(1, TILE_SCORES // max(1, len(candidates)))
    for start in range(0, len(queries), height):
        rows = slice(start, min(start + height, len(queries)))
        scores = queries[rows] @ candidates.T
        chosen = correct(scores, rows)[:, None]
        score = scores.gather(1, chosen)
        before = ~(scores <= score)  # not `>`, which is false where there is no number
        before |= (scores == score) & (position < chosen)
        ranks[rows] = before.sum(dim=1)
    return ranks
