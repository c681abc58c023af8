"""A run's checkpoints: written from all ranks of a layout, loaded into any other, pruned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.collect import collect_pieces
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import KINDS, PieceReader, write_index, write_pieces
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.engine.groups import Groups
from parallel_clip.model.parameters import Parameter, fill_slice
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
        stays on the training thread (`list(collect_pieces(...))` takes all of it at once);
        `write_pieces` uses no collective and may run on another thread; `_commit` is called once
        that has ended.
        """
        folder = self._groups.run_on_rank_zero(lambda: commit.begin(self.run_dir, meta.step))
        entries = write_pieces(folder, self._groups.rank, collect_pieces(state, self._groups))
        checkpoint = self._commit(folder, meta, entries)
        if self._keep is not None:
            self._groups.run_on_rank_zero(lambda: commit.prune(self.run_dir, self._keep))
        return checkpoint

    def load(self, folder: Path, state: TrainState) -> Meta:
        """Fill a rank's weights, masters and moments from a checkpoint of any run and layout.

        A checkpoint without moments (of a conversion) leaves the optimizer's as they are.

        Raises:
            InputError: the checkpoint is damaged.
        """
        meta = Meta.read(folder)
        reader = PieceReader(folder)
        for parameter, tensor in state.global_parameters():
            values = {
                kind: self._read_local(reader, f"{kind}:{parameter.name}", parameter)
                for kind in (KINDS if meta.has_moments else KINDS[:1])
            }
            state.optimizer.set_weight(tensor, values.pop("weight"))
            if meta.has_moments and meta.step > 0:
                state.optimizer.set_moments(tensor, values, meta.step)
        return meta

    def _commit(self, folder: Path, meta: Meta, entries: list[dict]) -> Path:
        """Once every rank has written: the index, `meta.json`, and the rename that makes it count.
        Returns the final folder."""
        of_ranks = gather_objects(entries, self._groups.world)

        def finish() -> Path:
            write_index(folder, [entry for of_rank in of_ranks for entry in of_rank])
            meta.write(folder)
            return commit.commit(self.run_dir, meta.step)

        return self._groups.run_on_rank_zero(finish)

    def _read_local(self, reader: PieceReader, key: str, parameter: Parameter) -> Tensor:
        """This tensor rank's part of a tensor: fp32 on the CPU, zeros where padded."""
        axis = parameter.placement.axis
        if axis is None:
            return reader.read(key)
        rank, size = self._groups.tensor_rank, self._groups.layout.tensor
        part = torch.zeros(parameter.local_shape(size))
        read_range = partial(reader.read_range, key)
        return fill_slice(part, parameter.placement, parameter.shape[axis], rank, size, read_range)
