"""Whether a run may go on over the samples that there are now."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.errors import InputError
from parallel_clip.plan.resume import ResumePoint
from parallel_clip.plan.same_samples import require_same_data
from tests.data.shard_files import write_shards


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "data", [3, 4])
    data = {"train": [{"shards": str(tmp_path / "data")}]}
    return find_run_shards(config_from_dict({"train": {"steps": 1}, "data": data}), lambda _: None)


def resume(shards, change, kept=(0,)) -> None:
    """From a checkpoint whose fingerprint is that of the shards, changed."""
    before = deepcopy(shards.fingerprint)
    change(before)
    point = ResumePoint(Path("run/checkpoints/step_5"), SimpleNamespace(step=5, data=before))
    require_same_data(point, shards.fingerprint, kept, lambda: shards.listed, Path("run"))


def test_the_same_samples_are_taken_up(shards):
    resume(shards, lambda before: None)
    resume(shards, lambda before: before["held_out"].update(loss=1))  # may be others


@pytest.mark.parametrize("version", [1, 2, 4, None])
def test_another_versions_order_is_refused_in_one_sentence(shards, version):
    with pytest.raises(InputError) as caught:
        resume(shards, lambda before: before.update(order=version))
    message = str(caught.value)
    assert "by a version of parallel_clip that puts samples in another order" in message
    assert "init.from=run/checkpoints/step_5" in message and "\n" not in message


@pytest.mark.parametrize("key", ["shards", "samples", "checksum", "contents"])
def test_other_samples_are_refused(shards, key):
    with pytest.raises(InputError, match="the training data are not those of"):
        resume(shards, lambda before: before["sources"][0].update({key: 5}))


def test_sources_that_the_run_has_not_come_to_may_be_others(shards):
    """There may also be more or fewer of them."""
    resume(shards, lambda before: before.update(sources=[]), kept=())
    resume(shards, lambda before: before["sources"].append({"samples": 9}))
