"""A run's checkpoints: written from all ranks of a layout, loaded into any other, pruned."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.collect import collect_pieces
from parallel_clip.checkpoint.load import load_checkpoint
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import Piece, PieceWriter, write_index
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.engine.groups import Groups
from parallel_clip.optimizer.train_state import TrainState


class Checkpointer:
    """The checkpoints of the run in `run_dir`. All ranks call each method together.

    keep: how many `save` leaves, counted back from the one that it wrote; None: all.
    """

    def __init__(self, run_dir: Path, groups: Groups, keep: int | None = None):
        self.run_dir = run_dir
        self._groups = groups
        self._keep = keep

    def save(self, meta: Meta, state: TrainState) -> Path:
        """Collect, write, commit and prune; returns the checkpoint's folder.

        A write beside training fits in here: collecting copies to host memory by collectives, so it
        stays on the training thread (`list(collect_pieces(...))` takes all of it at once); `_write`
        uses no collective and may run on another thread; `_commit` is called once that has ended.
        """
        folder = self._groups.run_on_rank_zero(lambda: commit.begin(self.run_dir, meta.step))
        entries = self._write(folder, collect_pieces(state, self._groups))
        checkpoint = self._commit(folder, meta, entries)
        self.prune()
        return checkpoint

    def load(self, folder: Path, state: TrainState) -> Meta:
        """Fill `state` from a checkpoint of any run and layout; see `load_checkpoint`."""
        return load_checkpoint(folder, state, self._groups)

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it; None where there is none.

        Raises:
            InputError: `latest` names a folder that is not there.
        """
        return self._groups.run_on_rank_zero(lambda: commit.latest(self.run_dir))

    def prune(self) -> None:
        """Remove all but the `keep` newest checkpoints up to the one that `latest` names."""
        if self._keep is not None:
            self._groups.run_on_rank_zero(lambda: commit.prune(self.run_dir, self._keep))

    def _write(self, folder: Path, pieces: Iterable[Piece]) -> list[dict]:
        """Write this rank's files; returns their entries in the index."""
        writer = PieceWriter(folder, self._groups.rank)
        for piece in pieces:
            writer.add(piece)
        writer.flush()
        return writer.entries

    def _commit(self, folder: Path, meta: Meta, entries: list[dict]) -> Path:
        """Once every rank has written: the index, `meta.json`, and the rename that makes it count.
        Returns the final folder."""
        of_ranks = gather_objects(entries, self._groups.world)

        def finish() -> Path:
            write_index(folder, [entry for of_rank in of_ranks for entry in of_rank])
            meta.write(folder)
            return commit.commit(self.run_dir, meta.step)

        return self._groups.run_on_rank_zero(finish)
