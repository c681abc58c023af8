"""Shards that are cut, flipped, emptied or exchanged: what is read is in the source, or is bad.

With an index from before the damage, exactly the samples that it touches are bad. Without, a scan
ends where it cannot go on, and what it found before is whole.
"""

import io
import shutil
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.storage.shards import (
    BadSampleError,
    ShardFiles,
    ShardIndex,
    StoredSample,
    scan_headers,
    scan_shard,
)
from parallel_clip.data.tools.check import check_shard
from tests.data.shard_files import sample, write_shard

SAMPLES = {
    "first": {"jpg": b"j" * 700, "txt": b"one"},
    "long/" + "name" * 40: {"jpg": b"k" * 400, "txt": b"two"},  # a header that takes more blocks
    "third": {"jpg": b"", "txt": b"three", "cls": b"3"},
    "last": {"jpg": b"l" * 1500, "txt": b"four"},
}
FORMATS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def shard(folder, format, samples=SAMPLES) -> tuple:
    """A shard, its bytes, its index, and its samples."""
    path = write_shard(folder / "a.tar", samples, format=format)
    source = {key: StoredSample(key, dict(files)) for key, files in samples.items()}
    return path, path.read_bytes(), scan_shard(str(path)), source


def read_all(index: ShardIndex) -> tuple[list[StoredSample], list[int]]:
    """The samples that can be read, and the numbers of those that are bad."""
    files, good, bad = ShardFiles(), [], []
    for number in range(index.samples):
        try:
            good.append(files.read(index, number))
        except BadSampleError as error:
            assert error.key and error.reason
            bad.append(number)
    files.close()
    return good, bad


def touched(index: ShardIndex, place: int) -> list[int]:
    return [n for n in range(index.samples) if index.span(n)[0] <= place < index.span(n)[1]]


@pytest.mark.parametrize("format", FORMATS)
def test_cut_at_every_block(tmp_path, format):
    path, whole, index, source = shard(tmp_path, format)
    end_of_last = index.span(3)[1]
    with tarfile.open(path) as tar:  # a cut there leaves whole files
        ends = {m.offset_data + -(-m.size // 512) * 512 for m in tar}
    assert len(ends) == 9
    for length in range(0, len(whole), 512):
        path.write_bytes(whole[:length])
        good, bad = read_all(index)
        assert all(source[s.key] == s for s in good), length
        assert bad == [n for n in range(4) if index.span(n)[1] > length], length

        scan = scan_headers(str(path))
        assert (scan.damage is None) == (length in ends or length > end_of_last), length
        assert (scan.note is not None) == (length in ends), length
        found, none_bad = read_all(scan.index)
        assert not none_bad, length
        assert all(source[s.key] == s for s in (found[:-1] if scan.note else found)), length
        for stored in found:
            assert stored.files.items() <= source[stored.key].files.items(), length
        assert len(found) >= len(good) - 1, length


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "flip",
    [pytest.param(0x01, marks=pytest.mark.long), 0x20, pytest.param(0xFF, marks=pytest.mark.long)],
    ids=hex,
)
def test_every_byte_of_every_header_flipped(tmp_path, format, flip):
    path, whole, index, source = shard(tmp_path, format)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        contents = [range(m.offset_data, m.offset_data + -(-m.size // 512) * 512) for m in tar]
    headers = set(range(index.span(3)[1])) - {place for part in contents for place in part}
    assert len(headers) >= 9 * 512
    for place in sorted(headers):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        good, bad = read_all(index)
        assert bad == touched(index, place), place
        assert all(source[s.key] == s for s in good), place
        if place % 7 == 0:  # a scan takes a while
            check_scan_finds_no_other_pair(path, source)


def check_scan_finds_no_other_pair(path, source) -> None:
    """A long name lies outside of what a tar has checksums of, so a key may be another then."""
    pairs = [(stored.files["jpg"], stored.files["txt"]) for stored in source.values()]
    for stored in read_all(scan_headers(str(path)).index)[0]:
        if {"jpg", "txt"} <= stored.files.keys():
            assert (stored.files["jpg"], stored.files["txt"]) in pairs


@pytest.mark.parametrize("format", FORMATS)
def test_every_header_zeroed(tmp_path, format):
    """Which says the end to a reader that looks no further."""
    path, whole, index, source = shard(tmp_path, format)
    for start in range(0, index.span(3)[1], 512):
        if whole[start + 257 : start + 262] != b"ustar":
            continue
        path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        good, bad = read_all(index)
        assert bad == touched(index, start)
        assert all(source[s.key] == s for s in good)
        scan = scan_headers(str(path))
        assert "with more behind it" in scan.damage
        assert all(source[s.key] == s for s in read_all(scan.index)[0])


def test_emptied_and_exchanged(tmp_path):
    path, _, index, _ = shard(tmp_path, tarfile.GNU_FORMAT)
    others = {f"n{key[1:]}": files for key, files in SAMPLES.items()}  # of the same sizes
    other = write_shard(tmp_path / "b.tar", others)
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path)
    assert read_all(index) == ([], [0, 1, 2, 3])
    path.write_bytes(b"")
    assert read_all(index) == ([], [0, 1, 2, 3])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_a_bad_sample_and_nothing_else(tmp_path_factory, data):
    """A flip in the contents of a file cannot be told; its key and kind stay what they were."""
    folder = tmp_path_factory.mktemp("damage")
    path, whole, index, source = shard(folder, data.draw(st.sampled_from(FORMATS)))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        stretch = data.draw(st.binary(min_size=1, max_size=600))
        damaged[start : start + len(stretch)] = stretch
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for stored in read_all(index)[0]:
        assert stored.files.keys() == source[stored.key].files.keys()
    for stored in read_all(scan_headers(str(path)).index)[0]:
        assert stored.key


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "damage, broken",
    [
        (lambda whole, at: whole[:at], "c"),
        (lambda whole, at: whole[:at] + b"?" + whole[at + 1 :], "c"),
        (lambda whole, at: whole[:at] + bytes(512) + whole[at + 512 :], "c"),
        (lambda whole, at: b"", "a"),
    ],
    ids=["cut", "flipped", "zeroed", "emptied"],
)
def test_a_check_names_shard_and_key(tmp_path, damage, broken, indexed):
    samples = {key: sample(number) for number, key in enumerate("abcd")}
    path, whole, index, _ = shard(tmp_path, tarfile.GNU_FORMAT, samples)
    with tarfile.open(path) as tar:
        header = next(m.offset for m in tar if m.name == "c.txt")
    path.write_bytes(damage(whole, header))
    report = check_shard(str(path), index if indexed else None)
    assert all(found.shard == str(path) for found in report.broken)
    text = "\n".join(map(str, report.broken))
    if indexed or broken == "c":
        assert f"{path}, {broken}:" in text or f"{path}, number 0:" in text
    else:
        assert "it is empty" in text
    if indexed:
        assert report.samples == 4
