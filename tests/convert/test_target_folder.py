"""The folder that a conversion writes: whole or not there, whoever else writes."""

import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.convert.target_folder import check_target, new_folder
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_model


def fill(folder: Path, text: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)


def test_of_two_at_a_time_the_first_that_ends_is_there_whole(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(InputError, match="another process has written .*target meanwhile"):
        with new_folder(target) as one:
            (one / "config.json").write_text("one")
            with new_folder(target) as other:
                fill(other, "other")
            fill(one, "one")
    assert {f.name: f.read_text() for f in target.iterdir()} == {
        "config.json": "other", "model.safetensors": "other",
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["target"]


def die_in_the_middle(target: Path) -> None:
    with new_folder(target) as folder:
        fill(folder, "half")
        os._exit(0)


def test_what_a_killed_one_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    target = tmp_path / "target"
    process = get_context("fork").Process(target=die_in_the_middle, args=(target,))
    process.start()
    process.join()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".target.") and left.endswith(".unfinished")
    mine = [".target.unfinished", ".target.mine.unfinished", ".other.0123abcd.unfinished"]
    for name in mine:
        (tmp_path / name).mkdir()
    with new_folder(target) as one, new_folder(tmp_path / "second") as second:
        assert one.is_dir() and second.is_dir()
        fill(one, "one")
    assert sorted(os.listdir(tmp_path)) == sorted(["second", "target", *mine])


@pytest.mark.parametrize("name", ["x" * 255, "\u72ac" * 85])
def test_a_name_may_be_as_long_as_names_are(tmp_path, name):
    with new_folder(tmp_path / name) as folder:
        fill(folder, "")
    assert os.listdir(tmp_path) == [name]


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def too_long_in_the_middle(folder: Path) -> Path:
    return folder / ("x" * 300) / "y"


def a_link_to_itself(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def below_a_link_to_itself(folder: Path) -> Path:
    return a_link_to_itself(folder) / "target"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "target"


@pytest.mark.parametrize(
    "make",
    [too_long, too_long_in_the_middle, a_link_to_itself, below_a_link_to_itself, below_a_file],
)
def test_paths_that_cannot_be_are_named(tmp_path, make):
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="cannot"), new_folder(path):
        pass
    with pytest.raises(InputError, match="does not exist"):
        open_source(path)
    with pytest.raises(InputError, match="cannot|does not exist"):
        convert_checkpoint(tmp_path / "nowhere", path, "openclip")
    with pytest.raises(InputError, match="neither one of"):
        load_model(str(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert check_target(tmp_path / "link") == tmp_path / "empty"
