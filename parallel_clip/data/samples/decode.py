"""Decode a sample's files to a picture, a text and a label, within limits of size."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from parallel_clip.data.storage.shards import BadSampleError, StoredSample

PICTURE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")  # the first that a sample has is its picture

Image.init()  # all of Pillow's formats, of which a version or build may lack some
# What a picture may be, whatever the extension says: formats that Pillow decodes by itself, unlike
# EPS, which it hands to Ghostscript, or WMF, to Windows. JPEG includes MPO. TGA is last, since it
# has no mark of its own at which it is known.
PICTURE_FORMATS = tuple(
    name
    for name in (
        "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "CUR",
        "PCX", "PSD", "QOI", "TGA",
    )
    if name in Image.OPEN
)  # fmt: skip
MAX_PICTURE_BYTES = 64 * 2**20
MAX_PIXELS = 178_956_970  # where Pillow, and so OpenCLIP, refuses

DraftScale = Callable[[int, int], float]  # (width, height) -> fraction of both that is enough
ResizedSize = Callable[[int, int], tuple[int, int]]  # (width, height) -> what is made of them


@dataclass(frozen=True)
class PictureRule:
    """Which pictures are decoded, and how.

    max_pixels: width x height that a picture may have, itself and resized.
    shrink: by (width, height), the fraction of both that is enough; a JPEG is then decoded at 1/8,
    1/4 or 1/2 of its size where it can be, in a fraction of the time.
    resized: the size to which the transform resizes a picture as a whole, where that may be large.
    """

    max_pixels: int = MAX_PIXELS
    shrink: DraftScale | None = None
    resized: ResizedSize | None = None

    def check(self, sample: StoredSample, width: int, height: int) -> None:
        """BadSampleError: too many pixels."""
        most = f"at most {self.max_pixels:,} (data.max_pixels)"
        if width * height > self.max_pixels:
            raise bad_sample(sample, f"a picture of {width:,} x {height:,} pixels, {most}")
        if self.resized is None:
            return
        wide, high = self.resized(width, height)
        if wide * high > self.max_pixels:
            raise bad_sample(
                sample,
                f"a picture of {width:,} x {height:,}, so long that the evaluation transform makes "
                f"it {wide:,} x {high:,} pixels before it crops, {most}",
            )


_ANY_PICTURE = PictureRule()


def decode_picture(sample: StoredSample, rule: PictureRule = _ANY_PICTURE) -> Image.Image:
    """The sample's picture, decoded to its end, in RGB (alpha is dropped, not blended); the first
    frame of several. Raises BadSampleError.
    """
    extension = next((e for e in PICTURE_EXTENSIONS if e in sample.files), None)
    if extension is None:
        raise bad_sample(sample, f"no picture, only {_names(sample)}")
    data = sample.files[extension]
    if len(data) > MAX_PICTURE_BYTES:
        raise bad_sample(sample, f"a picture of {len(data):,} bytes, at most {MAX_PICTURE_BYTES:,}")
    try:
        with pillows_limit(rule.max_pixels), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            rule.check(sample, picture.width, picture.height)
            if rule.shrink is not None and picture.format == "JPEG":
                part = rule.shrink(picture.width, picture.height)
                wanted = math.ceil(part * picture.width), math.ceil(part * picture.height)
                picture.draft("RGB", wanted)
            return picture.convert("RGB")
    except BadSampleError:
        raise
    except UnidentifiedImageError:
        raise bad_sample(
            sample, f".{extension} is not a {', '.join(PICTURE_FORMATS)} file"
        ) from None
    except Image.DecompressionBombError as error:
        raise bad_sample(
            sample,
            f"a picture of more than {rule.max_pixels:,} pixels (data.max_pixels): {error}",
        ) from None
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = str(error) or type(error).__name__
        raise bad_sample(sample, f".{extension} cannot be decoded: {reason}") from None


@contextmanager
def pillows_limit(max_pixels: int) -> Iterator[None]:
    """Make Pillow refuse pictures, parts and frames of more than `max_pixels`, and warn of none;
    its own limit, a global, is restored afterwards."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # it warns above, and refuses above twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def label_of(sample: StoredSample) -> int:
    """The number of the sample's class, from `.cls`. Raises BadSampleError."""
    text = text_of(sample, "cls", 64).strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise bad_sample(sample, f".cls is {text!r}, not the number of a class")
    return int(text)


def text_of(sample: StoredSample, extension: str, limit: int) -> str:
    """A file of the sample as UTF-8. Raises BadSampleError, also above `limit` bytes."""
    try:
        return bytes_of(sample, extension, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_sample(sample, f".{extension} is not UTF-8: {error}") from None


def bytes_of(sample: StoredSample, extension: str, limit: int) -> bytes:
    """A file of the sample. Raises BadSampleError, also above `limit` bytes."""
    data = sample.files.get(extension)
    if data is None:
        raise bad_sample(sample, f"no .{extension}, only {_names(sample)}")
    if len(data) > limit:
        raise bad_sample(sample, f".{extension} of {len(data):,} bytes, at most {limit:,}")
    return data


def _names(sample: StoredSample) -> str:
    names = ", ".join(f".{extension}" for extension in sample.files) or "nothing"
    links = "; ".join(f".{extension} is {link}" for extension, link in sample.links.items())
    return f"{names} ({links})" if links else names


def bad_sample(sample: StoredSample, reason: str) -> BadSampleError:
    return BadSampleError(sample.key, reason)
