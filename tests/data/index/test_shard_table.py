import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.index import scan
from parallel_clip.data.index.beside import INDEX_NAME
from parallel_clip.data.index.index_file import IndexFile, entry_of, write_index
from parallel_clip.data.index.renew import renew_index
from parallel_clip.data.index.shard_table import (
    UNKNOWN,
    check_shards,
    counts_from_sidecars,
    find_checked_shards,
    find_shards,
    save_index,
    scan_unindexed,
)
from parallel_clip.data.storage.shards import ShardIndex
from parallel_clip.errors import InputError
from tests.data.shard_files import index_shards, write_shards


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


def test_new_shards_are_scanned_and_the_rest_kept(tmp_path, cache):
    paths = write_shards(tmp_path, [3, 2])
    index_shards(str(paths[0]), Said())
    said = Said()
    assert counts(index_shards(str(tmp_path), said)) == [3, 2]
    assert "index of 1 of 2 shards" in said[0]


def test_a_shard_of_another_size_than_indexed_is_an_error_until_the_index_is_renewed(
    tmp_path, cache, monkeypatch
):
    paths = write_shards(tmp_path, [3, 2])
    index_shards(str(tmp_path), Said())
    write_shards(tmp_path / "new", [5])
    shutil.copy(tmp_path / "new" / "000000.tar", paths[0])
    with pytest.raises(InputError) as caught:
        index_shards(str(tmp_path), Said())
    assert f"shard {paths[0]} has {paths[0].stat().st_size:,} bytes, but had" in str(caught.value)
    assert "with 3 samples" in str(caught.value) and "data index" in str(caught.value)
    assert counts(find_shards(str(tmp_path), Said())) == [3, 2]

    said = Said()
    assert counts(renew_index(str(tmp_path), said)) == [5, 2]
    assert f"changed since indexed: {paths[0]}" in said[0] and "index of 1 of 2 shards" in said[1]
    assert counts(index_shards(str(tmp_path), Said())) == [5, 2]


def test_a_copy_has_another_time_and_needs_no_new_index(tmp_path, cache):
    paths = write_shards(tmp_path, [3])
    index_shards(str(tmp_path), Said())
    os.utime(paths[0], ns=(1, 1))
    said = Said()
    index_shards(str(tmp_path), said)
    assert not said
    renew_index(str(tmp_path), said)
    assert "index of 1 of 1 shards" in said[1]


def test_openclips_counts_are_compared(tmp_path, cache):
    paths = write_shards(tmp_path, [3, 2])
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({"000000.tar": 3, "000001.tar": 2, "other.tar": 9}))
    assert counts(index_shards(str(tmp_path), Said())) == [3, 2]
    sizes.write_text(json.dumps({"000000.tar": 3, "000001.tar": 7}))
    with pytest.raises(InputError, match=f"{paths[1]} holds 2 samples, but sizes.json .* says 7"):
        index_shards(str(tmp_path), Said())
    sizes.write_text("[3, 2]")
    with pytest.raises(InputError, match="sizes.json is not a table of counts"):
        index_shards(str(tmp_path), Said())


def test_openclips_counts_suffice_where_nothing_is_read(tmp_path, cache):
    write_shards(tmp_path, [3, 2])
    (tmp_path / "sizes.json").write_text(json.dumps({"000000.tar": 3, "000001.tar": 7}))
    said = Said()
    found = find_shards(str(tmp_path), said)
    assert found.counts.tolist() == [UNKNOWN, UNKNOWN]
    shards = scan_unindexed(counts_from_sidecars(found), said)
    assert shards.counts.tolist() == [3, 7] and not said
    assert shards[0].samples == 3  # looked up when it is asked for
    with pytest.raises(InputError, match="holds 2 samples, but sizes.json beside it says 7"):
        shards[1]


def test_many_shards_are_scanned_by_processes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(scan, "FEW", 3)
    write_shards(tmp_path, [1, 2, 3, 4, 5])
    table = scan_unindexed(find_shards(str(tmp_path), Said()), Said(), workers=2)
    assert counts(table) == [1, 2, 3, 4, 5]
    assert counts(index_shards(str(tmp_path), Said())) == [1, 2, 3, 4, 5]


def test_a_table_of_shards_goes_to_another_process(tmp_path, cache):
    write_shards(tmp_path, [3, 2])
    index_shards(str(tmp_path), Said())
    shards = index_shards(str(tmp_path), Said())
    assert shards[1].samples == 2
    copy = pickle.loads(pickle.dumps(shards))
    assert counts(copy) == [3, 2] and copy[1].table_checksum == shards[1].table_checksum


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0\n"), min_size=1, max_size=9),
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
        max_size=6,
    )
)
def test_an_index_file_gives_back_what_was_written(tmp_path_factory, shards):
    path = tmp_path_factory.mktemp("index") / "shards.index"
    written = [
        ShardIndex(
            name,
            number,
            np.arange(len(checksums) + 1, dtype=np.uint32),
            np.array(checksums, np.uint32),
            7 * number,
        )
        for number, (name, checksums) in enumerate(shards.items())
    ]
    write_index(path, [entry_of(shard, shard.path.encode()) for shard in written])
    file = IndexFile.read(path)
    names = np.array([name.encode() for name in shards] or [b""])
    rows = file.rows(names).tolist()
    assert file.rows(np.array([b"not/there"])).tolist() == [-1]
    for row, shard in zip(rows, written, strict=bool(written)):
        assert file.changed_ns[row] == 7 * shard.bytes
        found = file.shard(row, shard.path)
        assert (found.path, found.bytes) == (shard.path, shard.bytes)
        assert np.array_equal(found.bounds, shard.bounds)
        assert np.array_equal(found.checksums, shard.checksums)


def test_a_flipped_bit_in_the_index_is_noticed_where_it_is_read(tmp_path, cache):
    write_shards(tmp_path, [2, 2])
    index_shards(str(tmp_path), Said())
    file = tmp_path / INDEX_NAME
    data = bytearray(file.read_bytes())
    place = data.index(b"000000.tar") - 1  # of the last checksum
    data[place] ^= 1
    file.write_bytes(data)
    shards = index_shards(str(tmp_path), Said())
    assert shards[0].samples == 2
    with pytest.raises(InputError, match="000001.tar; delete it"):
        shards[1]


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
        lambda data: data.replace(b"index 2", b"index 9"),
        lambda data: data.replace(b'"U32"', b'"I32"'),
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


def test_missing_and_changed_shards_are_found_before_any_is_scanned(tmp_path, cache):
    paths = write_shards(tmp_path, [2, 2])
    index_shards(str(paths[0]))
    said = Said()
    with pytest.raises(InputError, match="1 of 3 shards do not exist: .*000002.tar"):
        find_checked_shards(f"{tmp_path}/{{000000..000002}}.tar", said)
    paths[0].write_bytes(paths[0].read_bytes() + b"more")
    with pytest.raises(InputError, match="but had"):
        find_checked_shards(str(tmp_path), said)
    assert not said


def test_tables_that_share_an_index_scan_and_save_it_once(tmp_path, cache):
    write_shards(tmp_path, [2, 3])
    said, folders = Said(), {}
    tables = [
        find_checked_shards(f"{tmp_path}/{name}", said, folders)
        for name in ("000000.tar", "000001.tar", "{000000..000001}.tar")
    ]
    for table in tables:
        save_index(table, said)
    assert [table.counts.tolist() for table in tables] == [[2], [3], [2, 3]]
    assert [line.split()[0] for line in said] == ["making", "making", "index"]
    assert find_shards(str(tmp_path), said).counts.tolist() == [2, 3]


def test_a_scanned_shard_is_looked_up_before_it_is_saved(tmp_path, cache):
    paths = write_shards(tmp_path, [2])
    table = find_checked_shards(str(tmp_path), Said())
    paths[0].write_bytes(b"cut")
    with pytest.raises(InputError, match="has 3 bytes, but had"):
        check_shards(table)
