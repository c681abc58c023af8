"""What ranks compare before weights are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel_clip.checkpoint.durable import hash_file
from parallel_clip.engine.versions import versions
from parallel_clip.errors import InputError
from parallel_clip.plan.resume import ResumePoint
from parallel_clip.training import lease
from parallel_clip.training.lease import LeaseToken, take_lease
from parallel_clip.training.start import check_same_view
from tests.checkpoint.saving import save

GROUPS = SimpleNamespace(rank=3)


def plan(run_dir: Path, resume: ResumePoint | None = None, **packages: str) -> SimpleNamespace:
    resume = resume or ResumePoint()
    return SimpleNamespace(run_dir=run_dir, resume=resume, versions=versions() | packages)


def test_what_all_see_is_fine(tmp_path):
    held = take_lease(tmp_path)
    folder = save(tmp_path, 10, 1.0)
    seen = ResumePoint(folder, None, hash_file(folder / "manifest.json").hash)
    check_same_view(plan(tmp_path, seen), held.token, GROUPS)
    held.release()


def test_a_run_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SEEN_SECONDS", 0.1)
    token = LeaseToken(tmp_path / "lease" / "000001.json", "an id")
    with pytest.raises(InputError, match="rank 3 on .* does not see the run folder"):
        check_same_view(plan(tmp_path), token, GROUPS)


def test_an_older_state_of_a_checkpoint_is_named(tmp_path):
    folder = save(tmp_path, 10, 1.0)
    seen = ResumePoint(folder, None, hash_file(folder / "manifest.json").hash)
    with pytest.raises(InputError, match="rank 3 on .* sees another checkpoint"):
        check_same_view(plan(tmp_path, replace(seen, manifest_hash="other")), None, GROUPS)
    gone = replace(seen, checkpoint=tmp_path / "checkpoints" / "step_00000020")
    with pytest.raises(InputError, match="rank 3 on .* does not see checkpoint"):
        check_same_view(plan(tmp_path, gone), None, GROUPS)


def test_other_versions_are_named(tmp_path):
    with pytest.raises(InputError, match=r"numpy [\d.]+ \(rank 0 has 1.0\)"):
        check_same_view(plan(tmp_path, numpy="1.0"), None, GROUPS)
