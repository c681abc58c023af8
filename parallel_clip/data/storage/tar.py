"""A small reader of tar headers: finds the regular files of an archive without reading them.

Every size is checked against the archive before it is used, nothing is ever extracted to a path,
links are named and not followed, and sparse files are refused.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from parallel_clip.data.storage.other_kinds import find_kind

MAX_NAME_BYTES = 64 * 1024  # of a long name, or of the extended header that holds one

_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_NAME_PARTS = (_LONG_NAME, _LONG_LINK, *_EXTENDED)
# Links, folders and devices: some writers give them a size, but no contents follow.
_BARE = {*tarfile.SUPPORTED_TYPES} - {*tarfile.REGULAR_TYPES, *_NAME_PARTS}
_BLOCK = tarfile.BLOCKSIZE
_STRETCH = 2**20

Read = Callable[[int, int], bytes]  # (bytes wanted, offset) -> bytes, fewer only at the end


class TarError(Exception):
    """The archive is not a whole, plain tar; the message says what is wrong where. `advice`: what
    to do where fetching or writing it again as it was does not help."""

    def __init__(self, what: str, advice: str | None = None):
        super().__init__(what)
        self.advice = advice


class NoEndMarkError(TarError):
    """The archive ends behind a whole member, but without an end mark; all members are read."""


class Member(NamedTuple):
    """A regular file in an archive, or a link; offsets in bytes from the archive's begin.

    Names are bytes. `name` holds them decoded so that none is lost (`decode_name`).
    """

    name: str
    header: int  # of its first header block, those of a long name included
    offset: int  # of its contents
    size: int
    checksum: int  # CRC-32 of its header blocks and of a long name
    link: str | None = None  # for people: to what a link leads, and how to write a file instead

    @property
    def end(self) -> int:
        """Offset of the next member's header."""
        return _padded(self.offset + self.size)


def members(read: Read, size: int, *, end_mark: bool = True) -> Iterator[Member]:
    """The regular files and the links of an archive of `size` bytes, in their order.

    With `end_mark` the archive closes with an empty block, as every tar does that was written to
    its end; without, `read` gives a piece of an archive that closes behind some member.
    Raises TarError where the archive breaks off or is not a tar, and NoEndMarkError behind the last
    member where only the end mark is missing.
    """
    position, header, long_name, long_link, extended, checksum = 0, None, None, None, {}, 0
    while position < size or end_mark:
        block = read(_BLOCK, position)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            if end_mark:
                _require_zeros(read, position, size)
            return
        except tarfile.HeaderError as error:
            raise _no_header(error, block, position, size, inside=header is not None) from None
        checksum = zlib.crc32(block, checksum)
        header = position if header is None else header
        length = 0 if info.type in _BARE else int(extended.get("size", info.size))
        offset = position + _BLOCK
        if length < 0 or offset + length > size:
            raise TarError(
                f"it breaks off: member {printable(info.name)} at byte {position:,} has "
                f"{length:,} bytes, but {size - offset:,} follow"
            )
        position = _padded(offset + length)
        if info.type in _NAME_PARTS:
            if length > MAX_NAME_BYTES:
                raise TarError(f"a name of {length:,} bytes, at most {MAX_NAME_BYTES:,} are read")
            padded = read(position - offset, offset)
            checksum = zlib.crc32(padded, checksum)
            part = padded[:length]
            if info.type == _LONG_NAME:
                long_name = decode_name(part.rstrip(b"\0"))
            elif info.type == _LONG_LINK:
                long_link = decode_name(part.rstrip(b"\0"))
            elif info.type in _EXTENDED:
                extended = _extended_header(part)
            continue
        name = extended.get("path") or long_name or info.name
        if info.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse") for k in extended):
            name = extended.get("GNU.sparse.name") or name
            raise TarError(
                f"member {printable(name)} at byte {header:,} is a sparse file, which is not read",
                "write the shard again without tar's --sparse (-S)",
            )
        if info.isreg():
            yield Member(name, header, offset, length, checksum)
        elif info.islnk() or info.issym():
            target = extended.get("linkpath") or long_link or info.linkname
            link = _describe_link(target, hard=info.islnk())
            yield Member(name, header, offset, 0, checksum, link)
        header, long_name, long_link, extended, checksum = None, None, None, {}, 0


def decode_name(name: bytes) -> str:
    """A name as text, by UTF-8; other bytes become lone surrogates, so that names that differ in
    any byte stay different. As Python's tarfile has it, and with it webdataset."""
    return name.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    r"""A name for people, logs and JSON: bytes that are no UTF-8 as \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _no_header(
    error: tarfile.HeaderError, block: bytes, position: int, size: int, inside: bool
) -> TarError:
    """What it means that `block` is no header; inside: a member has begun with a block for its
    name."""
    if position == 0:
        kind = find_kind(block)
        if kind is not None:
            return TarError(*kind)
    if len(block) == _BLOCK:
        return TarError(f"no tar header at byte {position:,} ({error})")
    # The rest of a block that is empty is what a cut left of the end mark: a header begins with a
    # name.
    if 0 < position <= size and not inside and not block.strip(b"\0"):
        return NoEndMarkError(f"it ends at byte {size:,} without the end mark of a tar")
    return TarError(f"it breaks off at byte {size:,}, inside a file or its header")


def _describe_link(target: str, hard: bool) -> str:
    kind, option = ("hard", "--hard-dereference") if hard else ("symbolic", "--dereference")
    return (
        f"a {kind} link to {printable(target)}, which is not followed: write the shard with tar "
        f"{option}"
    )


def _require_zeros(read: Read, position: int, size: int) -> None:
    """Behind the end mark there is only padding: a header that was zeroed is no end."""
    start = position
    while position < size:
        data = read(_STRETCH, position)
        if data.strip(b"\0"):
            raise TarError(f"an end mark at byte {start:,}, with more behind it")
        position += len(data) or size


def _extended_header(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\n" of a pax header."""
    records = {}
    while data.strip(b"\0"):
        digits, _, rest = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) <= 8 else 0
        if not len(digits) + 2 < length <= len(data):
            raise TarError("a damaged pax header")
        key, _, value = rest[: length - len(digits) - 2].partition(b"=")
        if key == b"size" and not (value.isdigit() and len(value) <= 20):
            raise TarError("a damaged pax header")
        records[decode_name(key)] = decode_name(value)
        data = data[length:]
    return records


def _padded(offset: int) -> int:
    return -(-offset // _BLOCK) * _BLOCK
