"""Which checkpoint is the newest, and which are kept. Crashes: test_kill_points.py."""

import pytest

from parallel_clip.checkpoint import commit
from parallel_clip.errors import InputError


def write(run_dir, step, keep=None):
    unfinished = commit.begin(run_dir, step)
    (unfinished / "content").write_text(f"of step {step}")
    (unfinished / "manifest.json").write_text("{}")
    folder = commit.commit(unfinished, step)
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


def test_each_attempt_has_a_folder_of_its_own(tmp_path):
    (commit.begin(tmp_path, 5) / "half a file").write_text("")
    folder = write(tmp_path, 5)
    assert sorted(f.name for f in folder.iterdir()) == ["content", "manifest.json"]
    (done,) = commit.clean(tmp_path)
    assert done.startswith("removed") and ".unfinished_step_00000005_" in done
    assert sorted(f.name for f in folder.parent.iterdir()) == ["latest", "step_00000005"]


def test_without_a_pointer_the_newest_whole_one_counts(tmp_path):
    """A crash came between the first rename and the pointer, or someone removed it."""
    for step in (5, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "step_00000015").mkdir()
    assert commit.latest(tmp_path).name == "step_00000010"


def test_a_checkpoint_that_waits_under_its_other_name_is_found_and_taken_back(tmp_path):
    folder = write(tmp_path, 5)
    waiting = folder.rename(folder.with_name(".replaced_step_00000005"))
    assert commit.latest(tmp_path) == waiting
    (done,) = commit.clean(tmp_path)
    assert "is back" in done and commit.latest(tmp_path) == folder


def test_who_may_not_write_any_more_shows_nothing(tmp_path):
    write(tmp_path, 5)

    def refuse():
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError):
        commit.commit(commit.begin(tmp_path, 10), 10, refuse)
    assert commit.latest(tmp_path).name == "step_00000005" and steps_kept(tmp_path) == [5]


def test_a_run_folder_that_is_gone_does_not_come_back(tmp_path):
    with pytest.raises(FileNotFoundError):
        commit.begin(tmp_path / "gone", 5)
    assert not (tmp_path / "gone").exists()


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


@pytest.mark.parametrize("text", ["\x00\xff", "..", "/", "step_5", "best", "step_00000005/../x"])
def test_a_pointer_of_garbage_is_named(tmp_path, text):
    write(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="latest names .* step_00000005"):
        commit.latest(tmp_path)
