"""Evaluations that all ranks leave together once any of them is asked to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel_clip.errors import InputError

T = TypeVar("T")


class EvaluationInterrupted(Exception):
    """All ranks left an evaluation at the same batch. It has no result."""


class Iterate(Protocol):
    """How an evaluation goes through its batches; `iter` is one that nothing interrupts."""

    def __call__(self, batches: Iterable[T]) -> Iterator[T]: ...


class InterruptibleBatches:
    """An `Iterate` that asks all ranks at each batch whether to go on.

    Called by all ranks of `group`, each with its own batches; their numbers may differ. An answer
    is waited for `ahead` batches later: with the number of pipeline stages these still work at the
    same time.

    device: of the group's collectives; is_asked: whether this rank has to stop; tick: called at
    each batch, to show that this goes on.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        is_asked: Callable[[], bool],
        *,
        ahead: int = 1,
        tick: Callable[[], None] = lambda: None,
    ):
        self._group = group
        self._device = device
        self._is_asked = is_asked
        self._ahead = ahead
        self._tick = tick

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields this rank's batches, and ends once every rank is through with its own.

        Raises:
            EvaluationInterrupted: a rank is asked to stop; on every rank, after the same number
                of questions.
            InputError: of `batches`, on the rank that met it, after the others are through.
        """
        source, questions = iter(batches), deque()
        failure, asked, others_go_on = None, False, True
        while others_go_on and not asked:
            self._tick()
            batch = None
            if failure is None:
                try:
                    batch = next(source, None)
                except InputError as error:
                    failure = error
            questions.append(self._ask(goes_on=batch is not None))
            if batch is not None:
                yield batch
            if len(questions) > self._ahead:
                asked, others_go_on = self._answer(*questions.popleft())
        for question in questions:  # of each the other ranks wait for this one's part
            self._answer(*question)
        if asked:
            raise EvaluationInterrupted
        if failure is not None:
            raise failure

    def _ask(self, goes_on: bool) -> tuple[torch.Tensor, dist.Work]:
        flags = torch.tensor([int(self._is_asked()), int(goes_on)], device=self._device)
        return flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    @staticmethod
    def _answer(flags: torch.Tensor, work: dist.Work) -> tuple[bool, bool]:
        """Whether any rank is asked to stop, and whether any has batches left."""
        work.wait()
        asked, goes_on = flags.tolist()
        return bool(asked), bool(goes_on)
