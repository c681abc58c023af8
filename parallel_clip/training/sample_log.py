"""Counts of the samples that a run has used, the list of bad ones, and the ledger of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from parallel_clip.data.feeding.training_data import Microbatch
from parallel_clip.engine.collectives import gather_objects
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import BadDataError
from parallel_clip.training.bad_fraction import is_above
from parallel_clip.training.feed import StepBatch
from parallel_clip.training.run_folder import (
    BAD_SAMPLES_FILE,
    LEDGER_FOLDER,
    SKIPPED_SAMPLES_FILE,
)


@dataclass
class SampleLog:
    """Counts samples over all ranks, and writes to the run folder which were bad.

    steps: of the whole run; epochs_by: how many epochs end by a position; bad_samples: bad ones so
    far, on every rank; source_samples: pairs so far of each source.
    """

    run_dir: Path
    groups: Groups
    global_batch: int
    steps: int
    epochs_by: Callable[[int], int]
    max_bad_fraction: float
    bad_samples: int
    source_samples: list[int]
    _first_bad: dict | None = None  # since this process began

    def own_counts(self, batch: StepBatch) -> list[int]:
        """This rank's bad samples of a step, and its samples of each source."""
        return [len(batch.bad), *batch.of_sources(len(self.source_samples))]

    def count(self, step: int, batch: StepBatch, everyones: np.ndarray) -> None:
        """Count a step's samples. Called by all ranks; everyones: `own_counts` of each, [ranks, n].

        Raises:
            BadDataError: the bad ones so far are evidence that more than `max_bad_fraction` are; at
                the end of an epoch or the run, more of those seen are.
        """
        bad_of_step, *of_sources = map(int, everyones.sum(axis=0))
        self.source_samples = [
            before + new for before, new in zip(self.source_samples, of_sources, strict=True)
        ]
        if bad_of_step:
            self.bad_samples += bad_of_step
            of_ranks = gather_objects([sample._asdict() for sample in batch.bad], self.groups.world)
            samples = [sample for of_rank in of_ranks for sample in of_rank]
            self._first_bad = self._first_bad or samples[0]
            if self.groups.is_rank_zero:
                bad_file = self.run_dir / BAD_SAMPLES_FILE
                _append(bad_file, ({"step": step, **sample} for sample in samples))
        self._check_limit(step)

    def _check_limit(self, step: int) -> None:
        seen, limit = step * self.global_batch, self.max_bad_fraction
        before = seen - self.global_batch
        ends = step == self.steps or self.epochs_by(seen) > self.epochs_by(before)
        too_many = ends and self.bad_samples > limit * seen
        if not too_many and not is_above(self.bad_samples, seen, limit):
            return
        example = ""
        if self._first_bad is not None:
            bad = self._first_bad
            example = f", such as {bad['key']} of {bad['shard']}: {bad['reason']}"
        raise BadDataError(
            f"{self.bad_samples:,} of the {seen:,} samples seen by step {step} are bad, more than "
            f"data.max_bad_fraction {limit:g} allows{example}. All are listed in "
            f"{self.run_dir / BAD_SAMPLES_FILE}; `parallel-clip data check` finds the rest"
        )

    def write_skipped(self, step: int, batch: StepBatch) -> None:
        """Write which samples a step that was left out had. Called by all ranks."""
        own = [sample for read in batch.read for sample in _samples(step, read)]
        of_ranks = gather_objects(own, self.groups.world)
        if self.groups.is_rank_zero:
            _append(self.run_dir / SKIPPED_SAMPLES_FILE, chain.from_iterable(of_ranks))

    def write_ledger(self, step: int, batch: StepBatch) -> None:
        """Write where each sample of a step lies: one file for each rank that reads."""
        if not self.groups.reads_data:
            return
        folder = self.run_dir / LEDGER_FOLDER
        folder.mkdir(exist_ok=True)
        _append(
            folder / f"rank_{self.groups.data_rank:05d}.jsonl",
            (sample for read in batch.read for sample in _samples(step, read)),
        )


def _samples(step: int, read: Microbatch) -> Iterator[dict]:
    """Where each sample of a microbatch lies, ready for JSON."""
    for position, address in zip(read.positions.tolist(), read.addresses, strict=True):
        yield {"step": step, "position": position, **address._asdict()}


def _append(file: Path, lines: Iterable[dict]) -> None:
    with file.open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)
