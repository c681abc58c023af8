"""Which samples each step saw, and how many of them were bad."""

from __future__ import annotations

import json
from dataclasses import dataclass

from parallel_clip.engine.groups import Groups
from parallel_clip.plan.run_plan import Job
from parallel_clip.training import run_folder
from parallel_clip.training.feed import StepBatch


@dataclass
class _Ledger:
    """Which samples each step saw: one file for each rank that reads."""

    job: Job
    groups: Groups

    def write(self, step: int, batch: StepBatch) -> None:
        if not self.groups.reads_data:
            return
        folder = self.job.run_dir / run_folder.LEDGER_FOLDER
        folder.mkdir(exist_ok=True)
        with (folder / f"rank_{self.groups.data_rank:05d}.jsonl").open("a") as file:
            for microbatch in batch.read:
                for position, address in zip(
                    microbatch.positions.tolist(), microbatch.addresses, strict=True
                ):
                    line = {"step": step, "position": position, **address._asdict()}
                    file.write(json.dumps(line) + "\n")
