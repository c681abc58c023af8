"""What a run writes down of its samples, over two ranks that read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parallel_clip.data.feeding.training_data import BadSample, Microbatch, StoredAddress
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import BadDataError
from parallel_clip.layout import Layout
from parallel_clip.training.exchange import tell_all
from parallel_clip.training.feed import StepBatch
from parallel_clip.training.sample_log import SampleLog


def two_steps(groups: Groups, run_dir: Path, limit: float) -> tuple[int, list[int], str]:
    """Steps of 2 pairs a rank, one of them bad in step 2: the counts, and the error."""
    log = SampleLog(
        run_dir, groups, 4, 2, lambda position: position // 8, limit, 1, source_samples=[10, 0]
    )
    error = ""
    for step in (1, 2):
        first = 4 * (step - 1) + 2 * groups.data_rank
        addresses = [StoredAddress(0, "a.tar", "x"), StoredAddress(1, "b.tar", "y")]
        bad = []
        if (step, groups.data_rank) == (2, 1):
            bad = [BadSample(first + 1, 1, "b.tar", "broken", "no picture")]
        positions = torch.tensor([first, first + 1])
        read = [Microbatch(torch.empty(0), torch.empty(0), positions, addresses, bad)]
        batch = StepBatch(None, read)
        try:
            own = tell_all(None, log.own_counts(batch), groups.device, groups.world)
            log.count(step, batch, own)
        except BadDataError as caught:
            error = str(caught)
        log.write_ledger(step, batch)
    return log.bad_samples, log.source_samples, error


@pytest.mark.parametrize("limit", [0.25, 0.2])
def test_samples_are_counted_listed_and_refused_on_every_rank(processes, tmp_path, limit):
    answers = processes.run(Layout(2), two_steps, run_dir=tmp_path, limit=limit)
    for bad, of_sources, error in answers:
        assert (bad, of_sources) == (2, [14, 4])
        if limit == 0.25:
            assert error == ""
        else:
            assert "2 of the 8 samples seen by step 2 are bad" in error
            assert "broken of b.tar: no picture" in error

    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 2, "position": 7, "source": 1, "shard": "b.tar", "key": "broken",
        "reason": "no picture",
    }  # fmt: skip
    ledger = [
        json.loads(line)
        for rank in range(2)
        for line in (tmp_path / f"ledger/rank_0000{rank}.jsonl").read_text().splitlines()
    ]
    assert sorted(line["position"] for line in ledger) == list(range(8))
    assert ledger[1] == {"step": 1, "position": 1, "source": 1, "shard": "b.tar", "key": "y"}
