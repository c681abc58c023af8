"""A run's checkpoints: written from all ranks of a layout, loaded into any other, pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from parallel_clip.checkpoint import commit, durable
from parallel_clip.checkpoint.collect import collect_pieces
from parallel_clip.checkpoint.manifest import Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.checkpoint.pieces import (
    INDEX_FILE,
    KINDS,
    PieceReader,
    WrittenPieces,
    write_index,
)
from parallel_clip.checkpoint.rank_write import RankWrite
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.engine.device import host_name
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import LeaseLostError, SaveFailedError
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import Parameter, fill_slice
from parallel_clip.model.resize_positions import PositionGrid, position_grids, resize_embedding
from parallel_clip.optimizer import AVERAGE, SQUARES
from parallel_clip.optimizer.train_state import TrainState

T = TypeVar("T")


class Checkpointer:
    """The checkpoints of the run in `run_dir`. All ranks call each method together.

    keep: how many `save` leaves, counted back from the one that it wrote; None: all. asynchronous:
    write on a thread while training goes on. failures: how many failed saves in a row are only
    told. files: that belong to the model and go into each checkpoint, by name. may_write: called on
    rank 0 before a checkpoint is shown; raises LeaseLostError where the run folder is another job's
    by now. tick: called at each piece that is read or written, to show that this goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        groups: Groups,
        keep: int | None = None,
        *,
        asynchronous: bool = False,
        failures: int = 0,
        files: Mapping[str, bytes] | None = None,
        may_write: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
        tick: Callable[[], None] = lambda: None,
    ):
        self.run_dir = run_dir
        self.whole_step: int | None = None  # of the newest checkpoint that was loaded or saved
        self.last_pause = 0.0  # seconds in which the last save kept training waiting
        self.longest_save = 0.0  # seconds from the first byte to the rename
        self._groups = groups
        self._keep = keep
        self._asynchronous = asynchronous
        self._failures = failures
        self._failed = 0
        self._files = files or {}
        self._may_write = may_write
        self._say = say if groups.is_rank_zero else lambda _: None
        self._tick = tick
        self._write: RankWrite | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes an asynchronous checkpoint. Where none does, `finish`
        commits it without waiting."""
        return self._write is not None and not self._write.done

    @property
    def has_pending(self) -> bool:
        """Whether a checkpoint has been begun and not committed; the same on every rank."""
        return self._write is not None

    def save(self, meta: Meta, state: TrainState, *, last: bool = False) -> None:
        """Save the checkpoint of `meta.step`; an asynchronous one is only begun.

        last: none will follow, so it is waited for and its failure is never just told.

        Raises:
            SaveFailedError: it cannot be written, and it is the last or more than `failures` in a
                row could not; the checkpoints before it are as they were. On every rank.
        """
        began = time.monotonic()
        self.finish()
        try:
            folder = self._on_rank_zero(lambda: commit.begin(self.run_dir, meta.step), meta.step)
            pieces = self._ticking(collect_pieces(state, self._groups))
            if self._asynchronous:
                pieces = list(pieces)  # by collectives, so before training goes on
            self._write = RankWrite(folder, self._groups.rank, meta, pieces, self._asynchronous)
        except SaveFailedError as error:
            self._tell_failure(error, last)
        if last or not self._asynchronous:
            self.finish(last=last)
        self.last_pause = time.monotonic() - began

    def finish(self, *, last: bool = False) -> None:
        """Wait for the write that is going on, if one is, commit it and prune. Raises as `save`."""
        write, self._write = self._write, None
        if write is None:
            return
        step = write.meta.step
        try:
            of_ranks = self._all_or_none(lambda: write.result(self._tick), step)
            self._on_rank_zero(lambda: self._commit(write, of_ranks), step)
        except SaveFailedError as error:
            if self._groups.is_rank_zero:
                durable.remove_folder(write.folder)
            self._tell_failure(error, last)
            return
        self._failed, self.whole_step = 0, step
        self.longest_save = max(self.longest_save, time.monotonic() - write.began)

    def load(self, folder: Path, state: TrainState) -> Meta:
        """Fill a rank's weights, masters, moments and averages from a checkpoint of any run and
        layout.

        Positions of another size are interpolated, and all that is kept of them alike; a second
        moment that would come out below 0 is 0. Tensors without moments there (of a conversion, or
        frozen so far) begin to be trained: the optimizer's are left as they are. Averages that are
        not there start from the weights; those that the state does not keep are left out.

        Raises:
            InputError: the checkpoint is damaged.
        """
        meta = Meta.read(folder)
        reader = PieceReader(folder)
        self.whole_step = meta.step
        frozen_before = frozenset(meta.frozen)
        resized = _resized_grids(meta, state)
        for parameter, tensor in self._ticking(state.global_parameters()):
            has_moments = meta.has_moments and parameter.name not in frozen_before
            kinds = KINDS if has_moments and tensor.requires_grad else KINDS[:1]
            grids = resized.get(parameter.name)
            values = {kind: self._read_local(reader, kind, parameter, grids) for kind in kinds}
            weight = values.pop("weight")
            state.set_weight(tensor, weight)
            updates = meta.updates_of(parameter.name)
            if values and updates > 0:
                state.optimizer.set_moments(tensor, values, updates)
            if state.average is not None and tensor.requires_grad:
                average = weight
                if meta.has_averages and parameter.name not in frozen_before:
                    average = self._read_local(reader, AVERAGE, parameter, grids)
                state.average.set(tensor, average)
        if state.average is not None and not meta.has_averages:
            self._say(f"{folder} has no averages of weights: they start from its weights")
        return meta

    def verify(self, folder: Path) -> None:
        """Hash every file of a checkpoint, each on one rank.

        Raises:
            InputError: one is not what was written; on every rank.
        """

        def verify_share() -> None:
            manifest = Manifest.read(folder)
            by_size = sorted(manifest.files, key=lambda name: manifest.files[name].bytes)
            share = by_size[self._groups.rank :: self._groups.layout.world]
            manifest.verify(folder, share)

        self._groups.run_on_all_ranks(verify_share)

    def _commit(self, write: RankWrite, of_ranks: list[WrittenPieces]) -> None:
        """On rank 0, once every rank has written."""
        files = {name: record for written in of_ranks for name, record in written.files.items()}
        entries = [entry for written in of_ranks for entry in written.entries]
        for name, content in self._files.items():
            files[name] = durable.write_new(write.folder / name, [content])
        files[INDEX_FILE] = write_index(write.folder, entries)
        files[META_FILE] = write.meta.write(write.folder)
        Manifest(files).write(write.folder)
        commit.commit(write.folder, write.meta.step, self._may_write)
        if self._keep is not None:
            try:
                commit.prune(self.run_dir, self._keep)
            except OSError as error:
                self._say(f"an old checkpoint could not be removed: {error}")

    def _all_or_none(self, function: Callable[[], T], step: int) -> list[T]:
        """Run `function` on every rank; the results of all, or SaveFailedError on all."""
        result, complaint, error_type = None, None, SaveFailedError
        try:
            try:
                result = function()
            except OSError:
                self._may_write()  # who took the lease over has removed what this one was writing
                raise
        except OSError as error:
            where = f" (rank {self._groups.rank} on {host_name()})"
            complaint = f"{error.strerror or error}: {error.filename or self.run_dir}{where}"
        except LeaseLostError as error:
            complaint, error_type = str(error), LeaseLostError
        outcomes = gather_objects((result, complaint, error_type), self._groups.world)
        for _, complaint, error_type in outcomes:
            if complaint is not None:
                whole = "no checkpoint was written before"
                if self.whole_step is not None:
                    whole = f"the checkpoint of step {self.whole_step} is whole"
                raise error_type(f"save of step {step} failed: {complaint}; {whole}")
        return [result for result, _, _ in outcomes]

    def _on_rank_zero(self, function: Callable[[], T], step: int) -> T:
        zero = self._groups.is_rank_zero
        return self._all_or_none(lambda: function() if zero else None, step)[0]

    def _tell_failure(self, error: SaveFailedError, last: bool) -> None:
        self._failed += 1
        if last or self._failed > self._failures or isinstance(error, LeaseLostError):
            raise error
        self._say(f"{error}; training goes on (failed save {self._failed} of {self._failures})")

    def _ticking(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._tick()
            yield item

    def _read_local(
        self,
        reader: PieceReader,
        kind: str,
        parameter: Parameter,
        resized: tuple[PositionGrid, PositionGrid] | None,
    ) -> Tensor:
        """This tensor rank's part of a tensor: fp32 on the CPU, zeros where padded. resized: the
        grids of positions there and here, where they differ."""
        key, axis = f"{kind}:{parameter.name}", parameter.placement.axis
        if resized is not None:  # every tensor rank holds all positions
            return resize_embedding(reader.read(key), *resized, is_square=kind == SQUARES)
        if axis is None:
            return reader.read(key)
        rank, size = self._groups.tensor_rank, self._groups.layout.tensor
        part = torch.zeros(parameter.local_shape(size))
        read_range = partial(reader.read_range, key)
        return fill_slice(part, parameter.placement, parameter.shape[axis], rank, size, read_range)


def _resized_grids(meta: Meta, state: TrainState) -> dict[str, tuple[PositionGrid, PositionGrid]]:
    """The grids of positions in a checkpoint and in a state, by name, where they differ."""
    old = position_grids(architecture_from_json(meta.model, meta.model_name))
    new = position_grids(state.chunks[0].architecture)
    return {name: (old[name], grid) for name, grid in new.items() if old[name] != grid}
