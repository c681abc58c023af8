import io
import tarfile

import pytest
import webdataset

from parallel_clip.data.storage import shards
from parallel_clip.data.storage.files import OpenFiles
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles, scan_shard, split_name
from parallel_clip.errors import InputError
from tests.data.shard_files import sample, write_shard, write_shards


@pytest.mark.parametrize(
    "name, parts",
    [
        ("a/b/0001.jpg", ("a/b/0001", "jpg")),
        ("0001.seg.PNG", ("0001", "seg.png")),
        ("./0001.txt", ("./0001", "txt")),
        ("v1.0/0001.txt", ("v1.0/0001", "txt")),
        ("README", None),
        ("a/._0001.jpg", None),
        (".hidden.txt", None),
        ("__index__/a.json", None),
    ],
)
def test_names_split_as_webdataset_splits_them(name, parts):
    assert split_name(name) == parts
    if parts is not None:
        key, extension = webdataset.tariterators.base_plus_ext(name)
        assert (key, extension.lower()) == parts


def test_a_shard_is_read_as_webdataset_reads_it(tmp_path):
    samples = {
        "a/0": sample(0),
        "b.x/1": {**sample(1), "json": b"{}", "cls": b"7"},
        "long" * 60: sample(2),
        "picture": {"jpg": b"no caption"},
        "caption": {"txt": b"no picture"},
    }
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_shard(tmp_path / "a.tar", samples, format=format)
        index, files = scan_shard(str(path)), ShardFiles()
        found = [files.read(index, number) for number in range(index.samples)]
        files.close()
        expected = [
            (item["__key__"], {k: v for k, v in item.items() if not k.startswith("__")})
            for item in webdataset.WebDataset(str(path), shardshuffle=False)
        ]
        assert [(item.key, item.files) for item in found] == expected
        assert len(expected) == 5


def test_only_so_many_shards_are_kept_open(tmp_path):
    indexes = [scan_shard(str(path)) for path in write_shards(tmp_path, [1] * 5)]
    files = ShardFiles(OpenFiles(limit=2))
    for _ in range(2):
        assert [files.read(index, 0).key for index in indexes] == [f"{n:05d}" for n in range(5)]
    assert len(files._files._open) == 2


def test_a_sample_that_is_too_large_is_bad_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 4096)
    index = scan_shard(str(write_shard(tmp_path / "a.tar", {"big": {"jpg": b"0" * 5000}})))
    with pytest.raises(BadSampleError, match="big.*at most 4,096") as caught:
        ShardFiles().read(index, 0)
    assert caught.value.key == "big"


def test_a_sample_with_two_files_of_a_kind_is_bad(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("one.jpg", "one.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(BadSampleError, match="two files .jpg"):
        ShardFiles().read(scan_shard(str(tmp_path / "a.tar")), 0)


def test_a_shard_that_was_cut_since_it_was_indexed_gives_bad_samples(tmp_path):
    (path,) = write_shards(tmp_path, [2])
    index = scan_shard(str(path))
    path.write_bytes(path.read_bytes()[: index.span(0)[1] + 600])
    files = ShardFiles()
    assert files.read(index, 0).key == "00000"
    with pytest.raises(BadSampleError, match="damaged in the shard"):
        files.read(index, 1)


@pytest.mark.parametrize(
    "contents, reason",
    [
        (b"", "it is empty"),
        (b"\x1f\x8b" + b"0" * 600, "compressed"),
        (b"not a tar at all" * 100, "no tar header"),
        (bytes(10240), "no samples"),
    ],
)
def test_files_that_are_no_shards(tmp_path, contents, reason):
    path = tmp_path / "a.tar"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=f"{path}.*{reason}"):
        scan_shard(str(path))


def test_a_second_sample_of_the_same_key_is_bad(tmp_path):
    """Its files would have been paired with the first one's by some readers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.txt", "b.txt", "a.jpg", "c.txt"):
            tar.addfile(tarfile.TarInfo(name))
    path = tmp_path / "a.tar"
    path.write_bytes(buffer.getvalue())
    index, files = scan_shard(str(path)), ShardFiles()
    assert [files.read(index, number).key for number in (0, 1, 3)] == ["a", "b", "c"]
    with pytest.raises(BadSampleError, match="twice") as caught:
        files.read(index, 2)
    assert caught.value.key == "a"
