"""Whatever happens while a checkpoint is written, `latest` names a whole one."""

import pytest

from parallel_clip.checkpoint import commit
from parallel_clip.errors import InputError


def write(run_dir, step, keep=None):
    (commit.begin(run_dir, step) / "content").write_text(f"of step {step}")
    folder = commit.commit(run_dir, step)
    if keep is not None:
        commit.prune(run_dir, keep)
    return folder


def steps_kept(run_dir) -> list[int]:
    return sorted(int(f.name[5:]) for f in (run_dir / "checkpoints").glob("step_*"))


def test_nothing_yet(tmp_path):
    assert commit.latest(tmp_path) is None
    commit.begin(tmp_path, 5)
    assert commit.latest(tmp_path) is None


def test_latest_names_the_newest(tmp_path):
    for step in (5, 10):
        folder = write(tmp_path, step)
        assert folder == tmp_path / "checkpoints" / f"step_{step:08d}"
        assert (tmp_path / "checkpoints" / "latest").read_text() == folder.name + "\n"
        assert commit.latest(tmp_path) == folder
        assert (folder / "content").read_text() == f"of step {step}"


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 99_999_995, 100_000_000):
        write(tmp_path, step, keep=2)
    assert steps_kept(tmp_path) == [99_999_995, 100_000_000]
    write(tmp_path, 100_000_005, keep=None)
    assert len(steps_kept(tmp_path)) == 3


def test_other_peoples_folders_are_kept(tmp_path):
    (tmp_path / "checkpoints" / "best of all").mkdir(parents=True)
    write(tmp_path, 5, keep=1)
    write(tmp_path, 10, keep=1)
    assert (tmp_path / "checkpoints" / "best of all").is_dir()


def test_going_back_to_an_older_checkpoint(tmp_path):
    """Who writes an older name into `latest` trains on from there: what comes of it is kept."""
    for step in (10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010\n")
    folder = write(tmp_path, 15, keep=1)
    assert commit.latest(tmp_path) == folder
    assert (folder / "content").read_text() == "of step 15"
    folder = write(tmp_path, 20, keep=1)
    assert commit.latest(tmp_path) == folder


class Crash(BaseException):
    pass


CRASHES = {
    "while a file is flushed": "_flush_to_disk",
    "before the pointer moves": "_point_latest_to",
    "while old ones are counted": "_step_folders",
}


@pytest.mark.parametrize("crash", CRASHES)
def test_after_a_crash_the_latest_is_whole(tmp_path, monkeypatch, crash):
    write(tmp_path, 5, keep=2)

    def die(*_):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(commit, CRASHES[crash], die)
        write(tmp_path, 10, keep=2)
    newest = commit.latest(tmp_path)
    assert (newest / "content").read_text() == f"of step {int(newest.name[5:])}"

    for step in (10, 15):  # the run goes on, over what the crash has left
        folder = write(tmp_path, step, keep=2)
        assert commit.latest(tmp_path) == folder
        assert (folder / "content").read_text() == f"of step {step}"
    assert steps_kept(tmp_path) == [10, 15]


def test_what_a_crash_left_of_a_folder_goes(tmp_path):
    (commit.begin(tmp_path, 5) / "half a file").write_text("")
    folder = write(tmp_path, 5)
    assert [f.name for f in folder.iterdir()] == ["content"]


def test_a_pointer_to_nowhere_is_named(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000007\n")
    with pytest.raises(InputError, match="step_00000007.*step_00000005"):
        commit.latest(tmp_path)


def test_an_empty_pointer_is_named(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_text("")
    with pytest.raises(InputError, match="step_00000005"):
        commit.latest(tmp_path)
