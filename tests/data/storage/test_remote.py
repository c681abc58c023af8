"""Shards at addresses: a real HTTP server on this machine, read in parts through the cache."""

import os
import shutil

import pytest

from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.shard_table import find_checked_shards
from parallel_clip.data.storage import addresses, pages
from parallel_clip.data.storage.files import OpenFiles
from parallel_clip.data.storage.pages import PageCache, RemoteFile
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.data.storage.shards import ShardFiles
from parallel_clip.errors import InputError
from tests.data.http_server import serve
from tests.data.shard_files import index_shards, read_all, write_shards

pytest.importorskip("aiohttp")


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pages, "PAGE", 4096)
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)
    write_shards(tmp_path / "shards", [3, 4])
    with serve(tmp_path / "shards") as server:
        yield server


def test_the_samples_are_those_of_the_files(served, tmp_path):
    here = find_checked_shards(str(tmp_path / "shards"), print_nothing)
    there = index_shards(f"{served.address}/{{000000..000001}}.tar", print_nothing)
    assert there.counts.tolist() == [3, 4]
    expected = read_all(here)
    assert read_all(there) == expected

    # Everything is in the cache now, the index too: nothing more is asked for.
    served.requests.clear()
    again = index_shards(f"{served.address}/{{000000..000001}}.tar", print_nothing)
    assert read_all(again) == expected
    assert served.requests == []


def test_an_index_beside_the_shards_saves_reading_them(served, tmp_path):
    index_shards(str(tmp_path / "shards"), print_nothing)
    assert (tmp_path / "shards" / INDEX_NAME).is_file()
    served.requests.clear()
    found = index_shards(f"{served.address}/000001.tar", print_nothing)
    assert found.counts.tolist() == [4]
    assert {path for path, _ in served.requests} == {f"/{INDEX_NAME}"}


def test_what_fails_is_asked_for_again(served):
    served.failures = 3
    assert index_shards(f"{served.address}/000000.tar", print_nothing).counts.tolist() == [3]
    assert served.failures == 0


def test_what_fails_for_long_is_an_error_that_names_the_address(served):
    served.failures = 10_000
    with pytest.raises(InputError, match=r"000000.tar cannot be read: .*503.*tried 6 times"):
        index_shards(f"{served.address}/000000.tar", print_nothing)


def test_what_is_not_there_is_an_error_at_once(served):
    with pytest.raises(InputError, match="1 of 1 shards do not exist: .*nowhere.tar"):
        index_shards(f"{served.address}/nowhere.tar", print_nothing)


def test_a_server_that_gives_no_parts_is_refused(served):
    served.whole_files = True
    with pytest.raises(InputError, match="does not serve parts"):
        index_shards(f"{served.address}/000000.tar", print_nothing)


def test_the_cache_keeps_to_its_limit_and_reading_goes_on(served, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_WRITERS", 1000)
    shards = index_shards(f"{served.address}/{{000000..000001}}.tar", print_nothing)
    folder = tmp_path / "few"
    files = ShardFiles(OpenFiles(cache=PageCache(3 * 4096, folder)))
    expected = read_all(shards)
    for _ in range(2):
        assert read_all(shards, files) == expected
        held = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
        assert sum(held) <= 4 * (4096 + 8)


def test_a_cache_that_cannot_be_written_to_is_done_without(served, tmp_path):
    (tmp_path / "file").write_text("")
    shards = index_shards(f"{served.address}/000000.tar", print_nothing)
    files = ShardFiles(OpenFiles(cache=PageCache(folder=tmp_path / "file" / "folder")))
    assert len(read_all(shards, files)) == 3


def test_a_file_that_changed_is_another_file_to_the_cache(served, tmp_path):
    address = f"{served.address}/000000.tar"
    before = RemoteFile(address, PageCache()).read(2000, 0)
    shutil.copy(tmp_path / "shards" / "000001.tar", tmp_path / "shards" / "000000.tar")
    os.utime(tmp_path / "shards" / "000000.tar")
    after = RemoteFile(address, PageCache()).read(2000, 0)
    assert before != after == (tmp_path / "shards" / "000001.tar").read_bytes()[:2000]


def test_a_kind_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    with pytest.raises(InputError, match="pip install gcsfs"):
        index_shards("gs://bucket/{0..3}.tar", print_nothing)
