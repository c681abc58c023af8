import os
import shutil

import numpy as np
import pytest

from parallel_clip.data import index
from parallel_clip.data.index import INDEX_NAME, index_shards
from parallel_clip.errors import InputError
from tests.data.shard_files import write_shards


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Said(list):
    def __call__(self, line: str) -> None:
        self.append(line)


def counts(indexes):
    return [shard.samples for shard in indexes]


def test_an_index_is_made_once_and_said(tmp_path, cache):
    write_shards(tmp_path, [3, 2, 4])
    said, again = Said(), Said()
    first = index_shards(str(tmp_path), said)
    second = index_shards(str(tmp_path), again)
    assert counts(first) == counts(second) == [3, 2, 4]
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.bounds, other.bounds) and one.path == other.path
    assert "making the index of 3 of 3 shards" in said[0] and INDEX_NAME in said[1]
    assert not again
    assert not cache.exists()


def test_new_and_changed_shards_are_scanned_and_the_rest_kept(tmp_path, cache, monkeypatch):
    paths = write_shards(tmp_path, [3, 2])
    index_shards(str(paths[0]), Said())
    said = Said()
    assert counts(index_shards(str(tmp_path), said)) == [3, 2]
    assert "index of 1 of 2 shards" in said[0]

    write_shards(tmp_path / "new", [5])
    shutil.copy(tmp_path / "new" / "000000.tar", paths[0])
    os.utime(paths[0], ns=(1, 1))
    scanned = []
    monkeypatch.setattr(
        index, "_scan", lambda todo, say, scan=index._scan: scanned.extend(todo) or scan(todo, say)
    )
    said = Said()
    assert counts(index_shards(str(tmp_path), said)) == [5, 2]
    assert "does not fit 1 shards any more: 000000.tar" in said[0]
    assert scanned == [paths[0]]


def test_a_folder_that_is_not_writable_is_indexed_in_the_cache_folder(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "data", [2])
    refuse_writing_to(tmp_path / "data", monkeypatch)
    said, again = Said(), Said()
    index_shards(str(tmp_path / "data"), said)
    assert str(cache) in said[1] and len(list(cache.iterdir())) == 1
    assert counts(index_shards(str(tmp_path / "data"), again)) == [2] and not again


def test_an_index_that_can_be_kept_nowhere_still_serves(tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "data", [2])
    refuse_writing_to(tmp_path, monkeypatch)
    said = Said()
    assert counts(index_shards(str(tmp_path / "data"), said)) == [2]
    assert "PARALLEL_CLIP_CACHE" in said[1]


def refuse_writing_to(folder, monkeypatch):
    """Permissions do not bind a superuser, so `os.replace` refuses in their place."""

    def replace(source, target, replace=os.replace):
        if folder in target.parents:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-8],
        lambda data: data + b"12345678",
        lambda data: data.replace(b"index 1", b"index 9"),
        lambda data: data.replace(b'"samples": 2', b'"samples":-2'),
        lambda data: b"[]\n",
        lambda data: b"\x93NUMPY" * 100,
    ],
)
def test_a_damaged_index_is_made_again(tmp_path, cache, damage):
    write_shards(tmp_path, [2, 2])
    index_shards(str(tmp_path), Said())
    file = tmp_path / INDEX_NAME
    file.write_bytes(damage(file.read_bytes()))
    said = Said()
    assert counts(index_shards(str(tmp_path), said)) == [2, 2]
    assert "not readable" in said[0]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_every_broken_shard_is_named(tmp_path, cache):
    paths = write_shards(tmp_path, [2, 2, 2])
    paths[0].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:1500])
    with pytest.raises(InputError) as caught:
        index_shards(str(tmp_path), Said())
    assert f"{paths[0]} is not whole: it is empty" in str(caught.value)
    assert f"{paths[2]} is not whole: it breaks off" in str(caught.value)
    assert not (tmp_path / INDEX_NAME).exists()


def test_shards_may_be_named_twice(tmp_path, cache):
    path = str(write_shards(tmp_path, [2])[0])
    assert counts(index_shards([path, path], Said())) == [2, 2]
