"""Write shards from pictures and captions in a folder or listed in a CSV: `data pack`."""

import csv
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image

from parallel_clip.data.samples.decode import PICTURE_EXTENSIONS, PICTURE_FORMATS
from parallel_clip.data.storage.progress import Print, show_progress
from parallel_clip.data.storage.tar import printable
from parallel_clip.errors import InputError, SaveFailedError


@dataclass(frozen=True)
class _Pair:
    picture: Path
    name: str  # of the picture in the source
    captions: list[str]
    label: str | None  # the contents of `.cls`
    size: tuple[int, int]


def pack_folder(
    source: str | Path,
    target: str | Path,
    say: Print = print,
    *,
    samples_per_shard: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    seed: int = 0,
) -> list[Path]:
    """Write shards 000000.tar, ... to the folder `target`, which must hold none; returns them.

    `source` is a folder of pictures, each with its captions beside it (the lines of the `.txt` of
    the same name; a `.cls` is taken along), or a CSV file with the columns `file` (paths from the
    CSV's folder) and `caption`; rows of one file are its several captions. Pictures are shuffled by
    `seed`, so that neighbours in a folder are none in a shard, and their bytes copied as they are.
    Keys are nine digits and each sample has a `.json`, as img2dataset has it, with its key, the
    first caption, the picture's width and height, and the file's name (`printable`). The same
    input gives the same bytes. Shards appear in the target when all are written; where that fails
    or is interrupted there are none. InputError: nothing to pack, a picture without caption or that
    is none or cannot be read; SaveFailedError: the target cannot be written to.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; name a new or empty folder")
    if any(target.glob("*.tar")):
        raise InputError(f"{target} holds shards already; name a new or empty folder")
    pairs = list(_in_csv(source) if source.is_file() else _in_folder(source))
    if not pairs:
        raise InputError(f"{source} holds no pictures ({', '.join(PICTURE_EXTENSIONS)}) to pack")
    random.Random(seed).shuffle(pairs)
    progress = show_progress(pairs, len(pairs), "packed", say, "pictures")
    try:
        written = _write_all(progress, target, samples_per_shard, shard_bytes)
    except OSError as error:
        raise SaveFailedError(
            f"shards cannot be written to {target}: {error.strerror or error}; none is left there"
        ) from error
    say(f"packed {len(pairs):,} pictures into {len(written):,} shards in {target}")
    return written


def _write_all(
    pairs: Iterable[_Pair], target: Path, samples_per_shard: int, shard_bytes: int
) -> list[Path]:
    """Write shards to a folder in the target, then move them out of it."""
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as folder:
            pattern = folder.replace("%", "%%") + "/%06d.tar"
            with webdataset.ShardWriter(
                pattern, samples_per_shard, shard_bytes, verbose=0, mtime=0
            ) as shards:
                for number, pair in enumerate(pairs):
                    shards.write(_sample(number, pair))
            for path in sorted(Path(folder).iterdir()):
                moved.append(target / path.name)
                path.rename(moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # someone has put something else there
                target.rmdir()
        raise
    return moved


def _in_folder(folder: Path) -> Iterator[_Pair]:
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a folder of pictures nor a CSV file")
    pictures = sorted(path for path in folder.rglob("*") if _is_picture(path))
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise InputError(
            f"{len(bare):,} of {len(pictures):,} pictures have no caption: {bare[0]} has no "
            f"{bare[0].with_suffix('.txt').name} beside it; write it, or move the pictures away"
        )
    for path in pictures:
        label = path.with_suffix(".cls")
        yield _Pair(
            path,
            str(path.relative_to(folder)),
            _text(path.with_suffix(".txt")).splitlines(),
            _text(label) if label.is_file() else None,
            _size(path),
        )


def _in_csv(table: Path) -> Iterator[_Pair]:
    captions: dict[str, list[str]] = {}
    rows = csv.DictReader(_text(table).splitlines(keepends=True))
    if not {"file", "caption"} <= set(rows.fieldnames or ()):
        raise InputError(f"{table} needs the columns file and caption, it has {rows.fieldnames}")
    for row in rows:
        if not row["file"] or not (row["caption"] or "").strip():
            raise InputError(f"{table}, line {rows.line_num}: the file or the caption is empty")
        captions.setdefault(row["file"], []).append(" ".join(row["caption"].split()))
    for name, lines in captions.items():
        path = table.parent / name
        if not path.is_file() or not _is_picture(path):
            raise InputError(
                f"{table} names {name}: {path} is not a file ending in "
                f"{', '.join(PICTURE_EXTENSIONS)}"
            )
        yield _Pair(path, name, lines, None, _size(path))


def _sample(number: int, pair: _Pair) -> dict[str, str | bytes]:
    width, height = pair.size
    facts = {
        "key": f"{number:09d}",
        "caption": pair.captions[0] if pair.captions else "",
        "width": width,
        "height": height,
        "file": printable(pair.name),
    }
    sample = {
        "__key__": facts["key"],
        pair.picture.suffix[1:].lower(): _contents(pair.picture),
        "txt": "\n".join(pair.captions),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }
    if pair.label is not None:
        sample["cls"] = pair.label.encode()
    return sample


def _size(path: Path) -> tuple[int, int]:
    """Width and height; looked at before anything is written, when what is none can be named."""
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as picture:
            return picture.size
    except Exception as error:  # decoders raise almost anything
        raise InputError(f"{path} is no picture ({error}); move it away") from None


def _is_picture(path: Path) -> bool:
    return path.suffix[1:].lower() in PICTURE_EXTENSIONS


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror or error}")
