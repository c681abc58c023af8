"""Archives that are no plain, whole, sorted tar: each is named for what it is, with what to do."""

import io
import os
import subprocess
import tarfile

import pytest
import webdataset

from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.samples.decode import decode_picture
from parallel_clip.data.storage.shards import (
    BadSampleError,
    ShardFiles,
    StoredSample,
    scan_headers,
    scan_shard,
)
from parallel_clip.data.tools.check import check_shard
from parallel_clip.errors import InputError
from tests.data.shard_files import sample, write_shard


def read_all(path) -> list[StoredSample]:
    index, files = scan_shard(str(path)), ShardFiles()
    return [files.read(index, number) for number in range(index.samples)]


def write_files(path, files) -> str:
    """A tar of (name, contents), or (name, (type, target)) of a link."""
    with tarfile.open(path, "w") as tar:
        for name, contents in files:
            member = tarfile.TarInfo(name)
            if isinstance(contents, tuple):
                member.type, member.linkname = contents
                member.size = 700  # old writers give a hard link the size of its file
                tar.addfile(member)
            else:
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    return str(path)


def test_an_index_is_what_it_was(tmp_path):
    """The numbers are those of the first version: indexes that were written then stay valid."""
    long = "long/" + "name" * 40
    sizes = [
        ("first.jpg", 700), ("first.txt", 3), (f"{long}.JPG", 400), (f"{long}.txt", 3),
        ("__meta__/x.json", 2), ("third.jpg", 0), ("third.cls", 1), ("caf\udce9.txt", 9),
        ("folder", None), ("first.json", 1500), ("last.txt", 512),
    ]  # fmt: skip
    for format, bounds, checksums, table in [
        (
            tarfile.GNU_FORMAT,
            [0, 5, 15, 18, 21, 25, 27],
            [899235613, 2277159498, 2297427806, 357446267, 0, 1555571411],
            1612711136,
        ),
        (
            tarfile.PAX_FORMAT,
            [0, 5, 15, 18, 23, 27, 29],
            [85908169, 1440908180, 835709591, 2587631767, 0, 3326455823],
            2071522915,
        ),
    ]:
        path = tmp_path / "a.tar"
        with tarfile.open(
            path, "w", format=format, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for name, size in sizes:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
                member.size = size or 0
                tar.addfile(member, io.BytesIO(b"x" * member.size))
        index = scan_shard(str(path))
        assert index.bounds.tolist() == bounds
        assert index.checksums.tolist() == checksums
        assert index.table_checksum == table


SAMPLES = {key: sample(number) for number, key in enumerate("abc")}


@pytest.mark.parametrize("left", [0, 100, 512, 700, 1024])
def test_without_its_end_mark_a_shard_is_used_and_that_is_said(tmp_path, left):
    path = write_shard(tmp_path / "a.tar", SAMPLES)
    whole = read_all(path)
    end = scan_shard(str(path)).span(2)[1]
    path.write_bytes(path.read_bytes()[: end + left])
    assert read_all(path) == whole and len(whole) == 3
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == 3
    report = check_shard(str(path))
    assert report.broken == [] and report.samples == 3
    note = scan_headers(str(path)).note
    if left >= 512:
        assert note is None and report.remarks == []
    else:
        assert f"ends at byte {end + left:,} without the end mark" in note
        assert "writer was killed, or it was cut off" in note
        assert [str(remark) for remark in report.remarks] == [f"shard {path}: {note}"]


def test_a_cut_behind_a_picture_costs_its_sample_alone(tmp_path):
    path = write_shard(tmp_path / "a.tar", SAMPLES)
    with tarfile.open(path) as tar:
        last = tar.getmember("c.txt").offset
    path.write_bytes(path.read_bytes()[:last])
    report = check_shard(str(path))
    assert [(item.key, item.reason) for item in report.broken] == [("c", "no .txt, only .jpg")]
    assert len(report.remarks) == 1
    path.write_bytes(path.read_bytes()[: last - 600])
    assert "is not whole: it breaks off" in str(check_shard(str(path)).broken[0])
    with pytest.raises(InputError, match="is not whole: it breaks off"):
        scan_shard(str(path))


@pytest.mark.parametrize(
    "begin, words",
    [
        (b"\x04\x22\x4d\x18", "compressed by lz4; decompress it"),
        (b"\x1f\x9d", r"compressed by compress \(.Z\); decompress it"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd; decompress it"),
        (b"PK\x03\x04", "a zip archive; unpack it, and write its files with tar --sort=name"),
        (b"<!DOCTYPE html>\n<p>", "text .* begins with '<!DOCTYPE html>', as servers send"),
        (b'\xef\xbb\xbf\n {"error": 403}', r"""text .* begins with '{"error": 403}'"""),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
    ],
)
@pytest.mark.parametrize("size", [60, 2000])
def test_what_is_no_tar_is_named(tmp_path, begin, words, size):
    path = tmp_path / "a.tar"
    path.write_bytes(begin + b"\n" * (size - len(begin)))
    with pytest.raises(InputError, match=f"{path} cannot be used: .*{words}"):
        scan_shard(str(path))
    report = check_shard(str(path))
    assert len(report.broken) == 1 and "cannot be used" in report.broken[0].reason


def test_a_name_may_begin_like_another_kind_of_file(tmp_path):
    path = write_shard(tmp_path / "a.tar", {"<p>": sample(0), "PK\3\4": sample(1)})
    assert [found.key for found in read_all(path)] == ["<p>", "PK\3\4"]
    with pytest.raises(InputError, match="holds no samples"):
        scan_shard(write_files(tmp_path / "b.tar", [("{notes", b"")]))


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_files_are_named(tmp_path, format):
    with open(tmp_path / "b.jpg", "wb") as file:
        file.write(b"1")
        file.truncate(2**20)
    (tmp_path / "a.txt").write_text("a")
    command = ["tar", f"--format={format}", "--sparse", "-cf", "s.tar", "a.txt", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="member b.jpg at byte .* sparse .* without tar's --spars"):
        scan_shard(str(tmp_path / "s.tar"))


def test_links_are_named_where_their_file_is_missed(tmp_path):
    """A folder in which equal files were linked, packed by the system's tar."""
    for key in "abc":
        for extension, contents in {**SAMPLES[key], "json": b"{}"}.items():
            (tmp_path / f"{key}.{extension}").write_bytes(contents)
    for name, target in [("b.txt", "a.txt"), ("c.json", "a.json")]:
        os.remove(tmp_path / name)
        os.link(tmp_path / target, tmp_path / name)
    os.remove(tmp_path / "c.jpg")
    os.symlink("a.jpg", tmp_path / "c.jpg")
    names = sorted(name for name in os.listdir(tmp_path))
    subprocess.run(["tar", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    a, b, c = read_all(tmp_path / "s.tar")
    theirs = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    assert [item.keys() - {"__key__", "__url__", "__local_path__"} for item in theirs] == [
        found.files.keys() for found in (a, b, c)
    ]
    assert CaptionRule().captions_of(a) == ["picture number 0"] and decode_picture(a).size == (
        24,
        18,
    )
    with pytest.raises(BadSampleError) as caught:
        CaptionRule().captions_of(b)
    assert caught.value.reason == (
        "no .txt, only .jpg, .json (.txt is a hard link to a.txt, which is not followed: write "
        "the shard with tar --hard-dereference)"
    )
    assert CaptionRule().captions_of(c) == [
        "picture number 2"
    ]  # its .json is a link, and not needed
    with pytest.raises(
        BadSampleError, match="no picture.*jpg is a symbolic link to a.jpg.*--deref"
    ):
        decode_picture(c)


def test_a_sample_of_links_alone_is_not_lost(tmp_path):
    link = (tarfile.LNKTYPE, "a.txt")
    target = (tarfile.SYMTYPE, "x" * 150)
    files = [("a.txt", b"1"), ("b.jpg", link), ("b.txt", link), ("c.txt", target), ("d.txt", b"4")]
    found = read_all(write_files(tmp_path / "a.tar", files))
    assert [(item.key, list(item.files), list(item.links)) for item in found] == [
        ("a", ["txt"], []), ("b", [], ["jpg", "txt"]), ("c", [], ["txt"]), ("d", ["txt"], [])
    ]  # fmt: skip
    assert f"link to {'x' * 150}, which" in found[2].links["txt"]


def test_an_index_from_before_links_were_noted_still_serves(tmp_path):
    """There a link in front of a sample's files lies in the span of the sample before."""
    link = (tarfile.LNKTYPE, "a.txt")
    path = write_files(tmp_path / "a.tar", [("a.txt", b"1"), ("b.jpg", link), ("b.txt", b"2")])
    index, files = scan_shard(path), ShardFiles()
    assert index.bounds.tolist() == [0, 2, 5]
    index.bounds[1] = 3
    assert [files.read(index, n).key for n in (0, 1)] == ["a", "b"]


KEYS = [f"{number:03d}" for number in range(40)]


def test_files_that_are_not_sorted_by_sample(tmp_path):
    files = [(f"{key}.{extension}", b"1") for extension in ("jpg", "txt") for key in KEYS]
    path = write_files(tmp_path / "a.tar", files)
    with pytest.raises(InputError) as caught:
        scan_shard(path)
    words = (
        f"shard {path} cannot be used: its files are not sorted by sample: 40 of 40 keys stand in "
        f"two places or more (000 has .jpg at byte 0, .txt at byte {40 * 1024:,}); write it again "
        "with tar --sort=name"
    )
    assert str(caught.value) == words
    report = check_shard(path)
    assert [item.reason for item in report.broken] == [words] and report.samples == 80


def test_shards_with_the_same_keys_that_were_joined(tmp_path):
    files = [(f"{key}.{extension}", b"1") for key in KEYS for extension in ("jpg", "txt")]
    with pytest.raises(InputError, match=r"keys repeat: 40 of 40 .*000 has .jpg, .txt at byte 0, "):
        scan_shard(write_files(tmp_path / "a.tar", files * 2))


@pytest.mark.parametrize("repeated, total", [(10, 40), (11, 200)])
def test_single_repeats_are_bad_samples(tmp_path, repeated, total):
    keys = [f"{number:03d}" for number in range(total)]
    path = write_files(tmp_path / "a.tar", [(f"{key}.jpg", b"") for key in keys + keys[:repeated]])
    index = scan_shard(path)
    assert (index.checksums == 0).sum() == repeated and index.samples == total + repeated
