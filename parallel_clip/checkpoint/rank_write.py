"""What one rank writes of a checkpoint, at once or beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import Piece, WrittenPieces, write_pieces


class RankWrite:
    """The write of one rank's pieces, on a thread of its own or at once."""

    def __init__(
        self, folder: Path, rank: int, meta: Meta, pieces: Iterable[Piece], on_thread: bool
    ):
        self.folder = folder
        self.meta = meta
        self.began = time.monotonic()
        self._rank = rank
        self._pieces = 0  # that the thread has written
        self._outcome: WrittenPieces | Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(pieces,), daemon=True)
        if on_thread:
            self._thread.start()
        else:
            self._run(pieces)

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def result(self, tick: Callable[[], None]) -> WrittenPieces:
        """What was written, once it is; raises what `write_pieces` raised. tick: called while the
        thread comes forward."""
        seen = 0
        while not self.done:
            self._thread.join(0.2)
            if self._pieces != seen:
                seen = self._pieces
                tick()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _run(self, pieces: Iterable[Piece]) -> None:
        pieces = self._counted(pieces)
        try:
            self._outcome = write_pieces(self.folder, self._rank, pieces)
        except Exception as error:
            for _ in pieces:  # the other ranks wait for this one in the collectives behind them
                pass
            self._outcome = error

    def _counted(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            yield piece
            self._pieces += 1
