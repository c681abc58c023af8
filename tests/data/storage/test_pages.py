"""The cache of pages: what is damaged in it is fetched again."""

import os
import random
import shutil
from pathlib import Path

import pytest

from parallel_clip.data.index.renew import renew_index
from parallel_clip.data.storage import addresses, pages
from parallel_clip.data.storage.progress import print_nothing
from tests.data.http_server import serve
from tests.data.shard_files import index_shards, read_all, write_shards

pytest.importorskip("aiohttp")


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("PARALLEL_CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pages, "PAGE", 4096)
    monkeypatch.setattr(addresses.time, "sleep", lambda seconds: None)
    write_shards(tmp_path / "shards", [20])
    with serve(tmp_path / "shards") as server:
        yield server


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: random.randrange(4096)])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def grown(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(512))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def exchanged(file: Path) -> None:
    """With another page, which is whole in itself."""
    other = next(page for page in sorted(file.parent.parent.rglob("*.4096")) if page != file)
    file.write_bytes(other.read_bytes())


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, grown, flipped, zeroed, exchanged, a_folder])
def test_damaged_pages_are_fetched_again_and_no_shard_is_blamed(served, tmp_path, damage):
    random.seed(3)
    shards = index_shards(f"{served.address}/000000.tar", print_nothing)
    shutil.rmtree(tmp_path / "cache" / "pages")  # of scanning, which read the end mark, too
    expected = read_all(shards)
    kept = sorted((tmp_path / "cache" / "pages").rglob("*.4096"))
    assert len(kept) >= 5
    harmed = kept[::2]
    for file in harmed:
        damage(file)
    served.requests.clear()
    assert read_all(shards) == expected
    assert len(served.requests) == len(harmed)
    if damage is not a_folder:  # in its place nothing can be kept
        served.requests.clear()
        assert read_all(shards) == expected and not served.requests


def test_an_exchanged_shard_of_as_many_bytes_is_not_read_from_old_pages(served, tmp_path):
    """The pages are those of another version of the file, told by ETag or time."""
    address = f"{served.address}/000000.tar"
    before = read_all(index_shards(address, print_nothing))
    file = tmp_path / "shards" / "000000.tar"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes().replace(b"picture number", b"another number"))
    os.utime(file, (1e9, 1e9))
    assert file.stat().st_size == size
    shards = renew_index(address, print_nothing)
    after = read_all(shards)
    assert [s.files["txt"].replace(b"another", b"picture") for s in after] == [
        s.files["txt"] for s in before
    ]
    assert all(s.files["txt"].startswith(b"another") for s in after)
