import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_clip.data.storage.tar import MAX_NAME_BYTES, Member, NoEndMarkError, TarError, members


def read_all(data: bytes, **options) -> list[Member]:
    return list(members(lambda size, offset: data[offset : offset + size], len(data), **options))


def archive(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT, **pax) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **pax) as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return buffer.getvalue()


names = st.text(st.characters(codec="utf-8", exclude_characters="\0\n/"), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(names, st.binary(max_size=1500), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_finds_what_was_written(files, format):
    data = archive(files, format)
    found = {m.name: data[m.offset : m.offset + m.size] for m in read_all(data)}
    assert found == files


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_damage_is_a_tar_error_and_nothing_else(data, format):
    whole = bytearray(archive({"a.jpg": b"1" * 700, "x" * 150 + ".txt": b"two"}, format))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    try:
        found = read_all(bytes(whole))
    except TarError:
        return
    assert all(m.header < m.offset <= m.offset + m.size <= len(whole) for m in found)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000))
def test_an_archive_cut_off_anywhere_is_refused_or_told(length):
    whole = archive({"a.jpg": b"1" * 700, "a.txt": b"two"})
    end = 512 + 1024 + 512 + 512
    if length == 512 + 1024 or end <= length < end + 512:
        with pytest.raises(NoEndMarkError, match=f"ends at byte {length:,} without"):
            read_all(whole[:length])
    elif length < end:
        with pytest.raises(TarError, match="breaks off"):
            read_all(whole[:length])
    else:
        assert len(read_all(whole[:length])) == 2


def test_a_piece_of_an_archive_needs_no_end_mark():
    whole = archive({"a.jpg": b"1" * 700, "b.txt": b"two"})
    first, second = read_all(whole)
    piece = whole[second.header : second.end]
    assert [m.name for m in read_all(piece, end_mark=False)] == ["b.txt"]
    assert first.end == second.header


def test_folders_and_devices_are_passed_over_and_links_named():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, type in [
            ("folder", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("device.jpg", tarfile.CHRTYPE),
            ("real.jpg", tarfile.REGTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
    found = [
        (m.name, m.link and m.link.partition(", which")[0]) for m in read_all(buffer.getvalue())
    ]
    assert found == [
        ("link.jpg", "a symbolic link to /etc/passwd"),
        ("hard.jpg", "a hard link to /etc/passwd"),
        ("real.jpg", None),
    ]


def test_long_names_are_bounded():
    with pytest.raises(TarError, match="a name of"):
        read_all(archive({"x" * (MAX_NAME_BYTES + 1): b""}))


def test_a_pax_header_with_a_wild_length_is_refused():
    whole = bytearray(archive({"x" * 150: b"1"}, tarfile.PAX_FORMAT))
    whole[512:515] = b"999"
    with pytest.raises(TarError, match="pax"):
        read_all(bytes(whole))
