"""Writing a checkpoint from all ranks of a layout.

Each tensor is gathered over its data-parallel group onto one rank, another for each tensor, so
that they share the writing. A tensor that all tensor ranks hold is written by the first; each stage
of a pipeline writes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.collect import _add_pieces, _gather_state
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.checkpoint.pieces import PieceWriter, write_index
from parallel_clip.engine.groups import Groups
from parallel_clip.model.clip import CLIPModel, global_parameters
from parallel_clip.optimizer.adamw import Optimizer


def save_checkpoint(
    run_dir: Path,
    meta: Meta,
    chunks: Sequence[CLIPModel],
    optimizer: Optimizer,
    groups: Groups,
    keep: int | None,
) -> Path:
    """Write, commit and prune; returns the checkpoint's folder. Called by all ranks."""
    folder = groups.run_on_rank_zero(lambda: commit.begin(run_dir, meta.step))
    writer = PieceWriter(folder, groups.rank)
    for number, (parameter, tensor) in enumerate(global_parameters(chunks)):
        if parameter.placement.axis is None and groups.tensor_rank != 0:
            continue
        state = _gather_state(tensor, optimizer, groups, to=number % groups.layout.data)
        if state is not None:
            _add_pieces(writer, parameter, state, groups)
    writer.flush()

    entries: list = [None] * groups.layout.world
    dist.all_gather_object(entries, writer.entries, group=groups.world)

    def finish() -> Path:
        write_index(folder, [entry for of_rank in entries for entry in of_rank])
        meta.write(folder)
        return commit.commit(run_dir, meta.step, keep)

    return groups.run_on_rank_zero(finish)
