"""Whatever is changed in a checkpoint, in any of its files, is found and named."""

import json
import random
import shutil

import pytest

from parallel_clip.checkpoint import durable
from parallel_clip.checkpoint.inspect import find_checkpoints, inspect_checkpoint
from parallel_clip.checkpoint.manifest import MANIFEST_FILE, Manifest
from parallel_clip.checkpoint.meta import META_FILE, Meta
from parallel_clip.errors import InputError
from tests.checkpoint.saving import content, save

FILES = ["index.json", "manifest.json", "meta.json", "rank_00000_000.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("run"), 10, 1.0)
    assert sorted(f.name for f in folder.iterdir()) == FILES
    assert content(folder) == (10, 1.0)
    return folder


def bits(size: int) -> list[int]:
    """The first and last bits of a file, and some in between."""
    return [
        *range(16),
        *range(8 * size - 16, 8 * size),
        *random.Random(0).sample(range(8 * size), 60),
    ]


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(whole, tmp_path, name):
    copy = tmp_path / "step_00000010"
    shutil.copytree(whole, copy)
    for bit in bits((whole / name).stat().st_size):
        flip(copy / name, bit)
        with pytest.raises(InputError, match=name):
            Manifest.read(copy).verify(copy)
        flip(copy / name, bit)
    assert content(copy) == (10, 1.0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "longer", "swapped"])
def test_other_damage_is_found(whole, tmp_path, name, damage):
    copy = tmp_path / "step_00000010"
    shutil.copytree(whole, copy)
    file = copy / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif damage == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        other = save(tmp_path / "other", 10, 2.0) if (tmp_path / "other").mkdir() is None else None
        shutil.copy(other / name, file)
    with pytest.raises(InputError) as found:
        Manifest.read(copy).verify(copy)
        assert damage == "swapped" and name in (MANIFEST_FILE, "index.json", "meta.json")
        raise InputError(f"{name} of the other checkpoint is the same")
    assert name in str(found.value) or damage == "swapped"
    if "is the same" not in str(found.value):
        state = inspect_checkpoint(copy, verify=True)
        assert state.verified is False and state.problem


def test_what_the_commands_say(whole):
    run = whole.parents[1]
    (folder,) = find_checkpoints(run)
    state = inspect_checkpoint(folder)
    assert (state.step, state.complete, state.verified, state.latest) == (10, True, None, True)
    assert state.bytes == sum((folder / n).stat().st_size for n in FILES if n != MANIFEST_FILE)
    assert inspect_checkpoint(folder, verify=True).verified is True
    assert find_checkpoints(folder) == [folder]
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_checkpoints(run / "nowhere")


def test_a_checkpoint_of_before_there_were_averages_is_read(tmp_path):
    folder = save(tmp_path, 10, 1.0)
    values = json.loads((folder / META_FILE).read_text())
    del values["has_averages"]
    (folder / META_FILE).write_text(json.dumps(values))
    files = Manifest.read(folder).files | {META_FILE: durable.hash_file(folder / META_FILE)}
    (folder / MANIFEST_FILE).unlink()
    Manifest(files).write(folder)
    assert content(folder) == (10, 1.0) and not Meta.read(folder).has_averages
