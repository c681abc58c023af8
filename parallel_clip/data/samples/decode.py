"""Decode a sample's files to a picture, captions and a label, within limits of size."""

import io
import json
import math
import warnings
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError

from parallel_clip.data.storage.shards import BadSampleError, StoredSample

PICTURE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")  # the first that a sample has is its picture
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")  # whatever the extension says
MAX_PICTURE_BYTES = 64 * 2**20
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
MAX_ASPECT = 100  # resizing the short side to size S makes a picture of S x 100 S
MAX_JSON_BYTES = 2**20
MAX_CAPTION_BYTES = 64 * 2**10

DraftScale = Callable[[int, int], float]  # (width, height) -> fraction of both that is enough


def decode_picture(sample: StoredSample, shrink: DraftScale | None = None) -> Image.Image:
    """The sample's picture, decoded to its end, in RGB (alpha is dropped, not blended).

    shrink: by (width, height), the fraction of both that is enough; a JPEG is then decoded at 1/8,
    1/4 or 1/2 of its size where it can be, in a fraction of the time. Raises BadSampleError.
    """
    extension = next((e for e in PICTURE_EXTENSIONS if e in sample.files), None)
    if extension is None:
        raise _bad(sample, f"no picture, only {_names(sample)}")
    data = sample.files[extension]
    if len(data) > MAX_PICTURE_BYTES:
        raise _bad(sample, f"a picture of {len(data):,} bytes, at most {MAX_PICTURE_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and, before our own limit, of size
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            _check_size(sample, picture.width, picture.height)
            if shrink is not None and picture.format == "JPEG":
                part = shrink(picture.width, picture.height)
                wanted = math.ceil(part * picture.width), math.ceil(part * picture.height)
                picture.draft("RGB", wanted)
            return picture.convert("RGB")
    except BadSampleError:
        raise
    except UnidentifiedImageError:
        raise _bad(sample, f".{extension} is not a {', '.join(PICTURE_FORMATS)} file") from None
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = str(error) or type(error).__name__
        raise _bad(sample, f".{extension} cannot be decoded: {reason}") from None


def captions_of(sample: StoredSample, caption_key: str | None = None) -> list[str]:
    """All captions, at least one: the lines of `.txt`, or what `.json` has at `caption_key`.

    Raises BadSampleError.
    """
    if caption_key is None:
        text = _text(sample, "txt", MAX_CAPTION_BYTES)
        captions = [line.removesuffix("\r") for line in text.split("\n")]
    else:
        try:
            record = json.loads(_text(sample, "json", MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise _bad(sample, f".json cannot be read: {error}") from None
        value = record.get(caption_key) if isinstance(record, dict) else None
        captions = [value] if isinstance(value, str) else value
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise _bad(sample, f".json has no text, or list of texts, at {caption_key!r}")
        try:
            longest = max((len(caption.encode()) for caption in captions), default=0)
        except UnicodeEncodeError:
            raise _bad(
                sample, "a caption with half of a surrogate pair, which is no text"
            ) from None
        if longest > MAX_CAPTION_BYTES:
            raise _bad(sample, f"a caption of {longest:,} bytes, at most {MAX_CAPTION_BYTES:,}")
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise _bad(sample, "the caption is empty")
    return captions


def label_of(sample: StoredSample) -> int:
    """The number of the sample's class, from `.cls`. Raises BadSampleError."""
    text = _text(sample, "cls", 64).strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise _bad(sample, f".cls is {text!r}, not the number of a class")
    return int(text)


def _check_size(sample: StoredSample, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _bad(sample, f"a picture of {width:,} x {height:,} pixels, at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _bad(
            sample, f"a picture of {width:,} x {height:,}, at most {MAX_ASPECT} times as long"
        )


def _text(sample: StoredSample, extension: str, limit: int) -> str:
    data = sample.files.get(extension)
    if data is None:
        raise _bad(sample, f"no .{extension}, only {_names(sample)}")
    if len(data) > limit:
        raise _bad(sample, f".{extension} of {len(data):,} bytes, at most {limit:,}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(sample, f".{extension} is not UTF-8: {error}") from None


def _names(sample: StoredSample) -> str:
    return ", ".join(f".{extension}" for extension in sample.files) or "nothing"


def _bad(sample: StoredSample, reason: str) -> BadSampleError:
    return BadSampleError(sample.key, reason)
