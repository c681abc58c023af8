"""Names in a tar are bytes: those that differ in any byte are different samples."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.samples.captions import CaptionRule
from parallel_clip.data.storage.shards import BadSampleError, ShardFiles, StoredSample, scan_shard
from parallel_clip.data.storage.tar import decode_name, printable
from parallel_clip.data.tools.check import decode_all_shards
from parallel_clip.data.tools.check_report import report_tree
from tests.data.shard_files import sample, write_shard

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write(path: Path, files: list[tuple[bytes, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of files with names of any bytes."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, contents in files:
            member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def read_keys(path: Path) -> list[str]:
    shard, files = scan_shard(str(path)), ShardFiles()
    return [files.read(shard, index).key for index in range(shard.samples)]


def test_a_picture_never_takes_the_caption_of_another_name(tmp_path):
    """The picture has no caption of its own, and the caption no picture."""
    picture, text = sample(0)["jpg"], b"another's"
    path = write(tmp_path / "0.tar", [(b"caf\xe9.jpg", picture), (b"caf\xe8.txt", text)])
    assert read_keys(path) == ["caf\\xe9", "caf\\xe8"]
    report = decode_all_shards(str(path), lambda line: None)
    assert [(item.key, item.reason) for item in report.broken] == [
        ("caf\\xe9", "no .txt, only .jpg"),
        ("caf\\xe8", "no picture, only .txt"),
    ]
    assert json.loads(json.dumps(report_tree(report)))["broken"][0]["key"] == "caf\\xe9"


ENCODED = [
    "caf\u00e9".encode("latin-1"),
    "\u72ac".encode("shift_jis"),
    "\u0441\u043e\u0431\u0430\u043a\u0430".encode("koi8-r"),
    b"\xff\xfe",
    "\u72ac".encode(),
    "e\u0301".encode(),
    b"plain",
]
stems = st.one_of(
    st.sampled_from(ENCODED),
    st.binary(min_size=1, max_size=40).filter(lambda b: not set(b"\0./\n") & set(b)),
    st.binary(min_size=120, max_size=200).filter(lambda b: not set(b"\0./\n") & set(b)),
)


@settings(max_examples=30)
@given(st.lists(stems, min_size=1, max_size=6, unique=True), st.sampled_from(FORMATS[1:]))
def test_as_many_samples_as_webdataset_reads(tmp_path_factory, names, format):
    path = tmp_path_factory.mktemp("shards") / "0.tar"
    write(path, [(n + end, b"1") for n in names for end in (b".txt", b".cls")], format)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    kept = [name for name in names if not name.startswith(b"__")]
    assert read_keys(path) == [printable(decode_name(name)) for name in kept]
    assert [s["__key__"] for s in theirs] == [decode_name(name) for name in kept]


@given(st.lists(st.binary(max_size=8), min_size=2, max_size=2, unique=True))
def test_two_names_are_never_decoded_to_one(names):
    one, other = map(decode_name, names)
    assert one != other


@pytest.mark.parametrize("format", FORMATS)
def test_names_in_each_format(tmp_path, format):
    path = write(tmp_path / "0.tar", [(b"a\xe9.txt", b"x"), (b"a\xe8.txt", b"y")], format)
    assert read_keys(path) == ["a\\xe9", "a\\xe8"]


def test_half_of_a_surrogate_pair_is_no_caption():
    record = {"caption": "\ud83d"}
    found = StoredSample("0", {"json": json.dumps(record).encode()})
    with pytest.raises(BadSampleError, match="half of a surrogate pair"):
        CaptionRule("caption").captions_of(found)


def test_a_line_break_in_a_name_is_a_byte_like_others(tmp_path):
    names = ["d\nx/y", "a\nb", "c/d\n"]
    path = write_shard(tmp_path / "a.tar", {name: sample(n) for n, name in enumerate(names)})
    assert scan_shard(str(path)).samples == len(list(webdataset.WebDataset(str(path)))) == 3
