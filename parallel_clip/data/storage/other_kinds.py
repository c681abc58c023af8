"""Recognise what lies in the place of a tar by its first bytes, and say what to do about it."""

from __future__ import annotations

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress (.Z)",
}
_SHOWN = 60  # characters of a text


def find_kind(begin: bytes) -> tuple[str, str] | None:
    """What a file is that begins so and has no tar header, and what to do; None: not known."""
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            return f"it is compressed by {name}", "decompress it: shards are read in place"
    if begin.startswith(b"PK\x03\x04"):
        return "it is a zip archive", "unpack it, and write its files with tar --sort=name"
    if begin.startswith(b"version https://git-lfs."):
        return "it is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"<", b"{")):
        line = text.splitlines()[0][:_SHOWN].decode("ascii", "backslashreplace")
        return (
            f"it is a text (HTML, XML or JSON) that begins with {line!r}, as servers send in place "
            "of a file",
            "see what it says (an error, a login), and fetch the shard again",
        )
    return None
