"""The loader of training: microbatches of tensors, read ahead by worker processes.

Any number of ranks, workers and microbatches gives the same bits: each pair is that which
`TrainingData` has at its position.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from parallel_clip.data.feeding.training_data import Microbatch, TrainingData
from parallel_clip.data.feeding.workers import read_ahead

MAX_PIECE = 256  # samples one worker decodes at a time; larger microbatches are joined of these


@dataclass(frozen=True)
class RankBatchSlice:
    """The part of every global batch that a data-parallel rank reads, and its microbatches (sizes
    in pairs)."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    ranks: int = 1

    def microbatches(self, step: int) -> list[range]:
        """The positions of each microbatch of step `step` (from 0)."""
        per_rank = self.global_batch // self.ranks
        first = step * self.global_batch + self.rank * per_rank
        starts = range(first, first + per_rank, self.micro_batch)
        return [range(start, start + self.micro_batch) for start in starts]


@dataclass
class TrainingLoader:
    """The microbatches of steps [first_step, steps), for one data-parallel rank.

    Iterating starts the workers, which read ahead until the iterator is dropped; it yields a step's
    list of microbatches at a time. Takes nothing from torch's global generator.
    """

    data: TrainingData
    step_slice: RankBatchSlice
    first_step: int
    steps: int
    _: KW_ONLY
    workers: int = 0
    prefetch: int = 2
    patience: float = 25.0
    pin_memory: bool = False

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Microbatch]]:
        steps = range(self.first_step, self.steps)
        ranges = (
            piece
            for step in steps
            for positions in self.step_slice.microbatches(step)
            for piece in _pieces(positions)
        )
        # Pieces that are joined are copied into page-locked memory by that, once.
        pin = self.pin_memory and self.step_slice.micro_batch <= MAX_PIECE
        pieces = read_ahead(self.data, ranges, self.workers, self.prefetch, pin, self.patience)
        for step in steps:
            yield [
                _join([next(pieces) for _ in _pieces(positions)], self.pin_memory)
                for positions in self.step_slice.microbatches(step)
            ]


def _pieces(positions: range) -> list[range]:
    return [positions[start : start + MAX_PIECE] for start in range(0, len(positions), MAX_PIECE)]


def _join(pieces: list[Microbatch], pin: bool) -> Microbatch:
    if len(pieces) == 1:
        return pieces[0]

    def joined(parts: list[Tensor]) -> Tensor:
        size = sum(map(len, parts)), *parts[0].shape[1:]
        return torch.cat(parts, out=torch.empty(size, dtype=parts[0].dtype, pin_memory=pin))

    return Microbatch(
        joined([piece.images for piece in pieces]),
        joined([piece.tokens for piece in pieces]),
        joined([piece.positions for piece in pieces]),
        [address for piece in pieces for address in piece.addresses],
        [bad for piece in pieces for bad in piece.bad],
        None if pieces[0].identities is None else joined([piece.identities for piece in pieces]),
    )
