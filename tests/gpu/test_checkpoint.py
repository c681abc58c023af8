"""A checkpoint goes from the CPU to the GPU and back without a bit changed, and trains on both."""

import shutil
from pathlib import Path

import pytest

from parallel_clip.checkpoint import commit
from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.config import load_config
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.openclip_json import architecture_from_json
from tests.launcher import succeed
from tests.ranks import empty_training
from tests.small_world import MODEL, make_world, metrics, tensors

pytestmark = pytest.mark.gpu

AT, STEPS = 2, 6


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The config of a run whose six steps were trained on the CPU."""
    path = make_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        # The server of tests/launcher.py, which starts now, must not begin with CUDA: what it
        # forks could neither use it nor do without.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        succeed("train", path)
    return path


def copy_up_to_step_two(run: Path, target: Path) -> Path:
    """A copy of a run that has not come further; returns its only checkpoint."""
    shutil.copytree(run, target)
    (target / "status.json").unlink()
    first, *later = commit.step_folders(target)
    for folder in later:
        shutil.rmtree(folder)
    (target / "checkpoints" / "latest").write_text(f"{first.name}\n")
    return first


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_moments_are_the_same_bits_after_the_gpu(groups, config, tmp_path, precision):
    checkpoint = copy_up_to_step_two(config.parent / "run", tmp_path / "run")
    written_on_cpu = tensors(checkpoint)
    settings = load_config(config, [f"precision={precision}"])
    state = empty_training(groups, settings, architecture())
    checkpointer = Checkpointer(tmp_path / "run", groups)
    meta = checkpointer.load(checkpoint, state)
    shutil.rmtree(checkpoint)
    checkpointer.save(meta, state, last=True)
    assert tensors(checkpoint) == written_on_cpu

    # And the CPU goes on from it as if it had never been elsewhere.
    succeed("train", config, f"run_dir={tmp_path}/run")
    ends = [commit.step_folders(run)[-1] for run in (config.parent / "run", tmp_path / "run")]
    assert ends[0].name == ends[1].name
    assert tensors(ends[0]) == tensors(ends[1])


def test_a_run_begun_on_the_cpu_goes_on_on_the_gpu(command, config, tmp_path):
    copy_up_to_step_two(config.parent / "run", tmp_path / "run")
    command("train", config, f"run_dir={tmp_path}/run")
    on_cpu, on_gpu = metrics(config.parent / "run"), metrics(tmp_path / "run")
    assert [line["step"] for line in on_gpu] == list(range(1, STEPS + 1))
    for ours, theirs in zip(on_gpu[AT:], on_cpu[AT:], strict=True):
        for what in ("loss", "grad_norm"):
            assert ours[what] == pytest.approx(theirs[what], rel=1e-4), (ours["step"], what)


def architecture() -> Architecture:
    return architecture_from_json(MODEL, "small")
