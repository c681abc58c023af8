import io
import struct

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import imagehandler

from parallel_clip.config import Config
from parallel_clip.data.samples import decode
from parallel_clip.data.samples.decode import PictureRule, decode_picture, label_of, pillows_limit
from parallel_clip.data.storage.shards import BadSampleError, StoredSample
from tests.data.shard_files import picture


def stored(**files: bytes) -> StoredSample:
    return StoredSample("key", files)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_the_contents_decide_the_format(kind, extension):
    assert decode_picture(stored(**{extension: picture(0, (20, 10), kind)})).size == (20, 10)


def in_mode(mode: str) -> Image.Image:
    """A picture of noise; in 16 or 32 bits, and with alpha, all of their range is used."""
    numbers = np.random.default_rng(3)
    if mode == "I;16":
        return Image.fromarray(numbers.integers(0, 2**16, (18, 24)).astype(np.uint16))
    if mode in ("I", "F"):
        pixels = numbers.integers(0, 2**16, (18, 24)).astype({"I": np.int32, "F": np.float32}[mode])
        return Image.fromarray(pixels)
    image = Image.open(io.BytesIO(picture(0)))
    alpha = Image.fromarray(numbers.integers(0, 255, (18, 24), np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(alpha)
    return image.convert(mode)


def of_two_frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.open(io.BytesIO(picture(n))) for n in range(2)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def photoshop(mode: int, channels: int, bits: int) -> bytes:
    """A PSD file of random pixels, uncompressed; Pillow writes none."""
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, 18, 24, bits, mode)
    pixels = np.random.default_rng(0).integers(0, 255, channels * 18 * 24, np.uint8)
    return head + bytes(12) + struct.pack(">H", 0) + pixels.tobytes()


def cursor() -> bytes:
    buffer = io.BytesIO()
    in_mode("RGBA").save(buffer, "ICO", bitmap_format="bmp", sizes=[(24, 18)])
    return b"\0\0\2" + buffer.getvalue()[3:]  # an icon but for its number


FILES = {
    f"{kind} {mode}": (kind, lambda kind=kind, mode=mode: encoded(in_mode(mode), kind))
    for kind, modes in {
        "JPEG": ["RGB", "L", "CMYK"],
        "PNG": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"],
        "WEBP": ["RGB", "RGBA"],
        "GIF": ["RGB", "L", "P", "RGBA"],
        "BMP": ["RGB", "L", "P", "RGBA", "1"],
        "DIB": ["RGB", "L"],
        "TIFF": ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"],
        "AVIF": ["RGB", "RGBA"],
        "JPEG2000": ["RGB", "L", "RGBA", "LA", "I;16"],
        "PPM": ["RGB", "L", "1", "I;16"],
        "ICO": ["RGB", "RGBA", "P"],
        "PCX": ["RGB", "L", "P", "1"],
        "QOI": ["RGB", "RGBA"],
        "TGA": ["RGB", "L", "P", "RGBA", "LA"],
    }.items()
    for mode in modes
}
FILES |= {
    f"{kind} of two frames": (kind, lambda kind=kind: of_two_frames(kind))
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "AVIF", "MPO")
}
FILES |= {
    "PSD RGB": ("PSD", lambda: photoshop(3, 3, 8)),
    "PSD RGBA": ("PSD", lambda: photoshop(3, 4, 8)),
    "PSD CMYK": ("PSD", lambda: photoshop(4, 4, 8)),
    "PSD L": ("PSD", lambda: photoshop(1, 1, 8)),
    "CUR": ("CUR", cursor),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_every_format_and_mode_are_those_of_webdataset(name):
    """OpenCLIP decodes by webdataset's pilrgb; it names all that is in these files .jpg."""
    kind, make = FILES[name]
    if kind not in (*decode.PICTURE_FORMATS, "MPO"):
        pytest.skip(f"this Pillow lacks {kind}")
    data = make()
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == kind
    decoded = decode_picture(stored(jpg=data))
    expected = imagehandler("pilrgb")("jpg", data)
    assert decoded.mode == "RGB" and decoded.size == expected.size
    assert np.array_equal(decoded, expected)
    assert len(np.unique(decoded)) > 1


def test_formats_that_need_other_programs_are_not_read():
    assert {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"} <= set(decode.PICTURE_FORMATS)
    eps = encoded(Image.new("RGB", (8, 8)), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(BadSampleError, match=".jpg is not a JPEG, PNG, .* file"):
        decode_picture(stored(jpg=eps))


def truncated(kind: str, cut: int) -> bytes:
    return picture(0, (64, 64), kind)[:-cut]


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "no picture, only nothing"),
        ({"txt": b"a"}, "no picture, only .txt"),
        ({"gif": b"GIF89a"}, "no picture, only .gif"),
        ({"jpg": b""}, "not a JPEG, PNG, WEBP, "),
        ({"jpg": truncated("JPEG", 1)}, "truncated"),
        ({"jpg": truncated("JPEG", 2000)}, "truncated"),
        ({"png": truncated("PNG", 2000)}, "cannot be decoded"),
        ({"webp": truncated("WEBP", 500)}, "cannot be decoded"),
        (
            {"png": encoded(Image.new("1", (20000, 20000)), "PNG")},
            r"more than 178,956,970 pixels \(data.max_pixels\): .*400000000",
        ),
    ],
)
def test_bad_pictures(files, reason, recwarn):
    with pytest.raises(BadSampleError, match=reason) as caught:
        decode_picture(stored(**files))
    assert caught.value.key == "key"
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "GIF", "ICO", "TIFF"])
def test_pixels_are_bounded_by_the_rule_alone(kind, monkeypatch, recwarn):
    sample = stored(png=picture(0, (20, 11), kind))
    assert decode_picture(sample, PictureRule(220)).size == (20, 11)
    for limit in (219, 218, 100, 1):
        with pytest.raises(BadSampleError, match=f"{limit} .*data.max_pixels|220 pixels"):
            decode_picture(sample, PictureRule(limit))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(sample.files["png"]))
    assert decode_picture(sample, PictureRule(220)).size == (20, 11)
    assert Image.MAX_IMAGE_PIXELS == 50 and not recwarn.list


def test_the_default_is_what_pillow_reads():
    assert decode.MAX_PIXELS == PictureRule().max_pixels == 2 * Image.MAX_IMAGE_PIXELS
    assert Config().data.max_pixels == decode.MAX_PIXELS


def test_pillows_limit_is_restored_after_an_error():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(KeyError), pillows_limit(10**9):
        assert Image.MAX_IMAGE_PIXELS == 5 * 10**8
        raise KeyError
    assert Image.MAX_IMAGE_PIXELS == before


def test_any_shape_is_read_unless_it_is_resized_beyond_the_limit():
    long = stored(png=encoded(Image.new("RGB", (3000, 1)), "PNG"))
    assert decode_picture(long).size == (3000, 1)

    def resized(width, height):
        return 32 * width // height, 32

    assert decode_picture(long, PictureRule(32 * 96_000, resized=resized)).size == (3000, 1)
    reason = "3,000 x 1, so long that .* 96,000 x 32 pixels before it crops, at most 3,071,999"
    with pytest.raises(BadSampleError, match=reason):
        decode_picture(long, PictureRule(32 * 96_000 - 1, resized=resized))


def test_a_picture_of_too_many_bytes(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PICTURE_BYTES", 100)
    with pytest.raises(BadSampleError, match="bytes, at most 100"):
        decode_picture(stored(jpg=picture(0)))


def test_labels():
    assert label_of(stored(cls=b" 17\n")) == 17


@pytest.mark.parametrize("text", [b"", b"-1", b"cat", "²".encode(), b"1" * 10, b"9" * 100])
def test_bad_labels(text):
    with pytest.raises(BadSampleError, match=".cls"):
        label_of(stored(cls=text))


def photo(width: int, height: int) -> bytes:
    """A smooth picture, as photographs are."""
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 9, height))
    pixels = 127 + 60 * np.stack([np.sin(across + down), np.cos(down), np.sin(across - down)], -1)
    return encoded(Image.fromarray(pixels.astype(np.uint8)), "JPEG")


@pytest.mark.parametrize(
    "part, size", [(1.0, (800, 600)), (0.51, (800, 600)), (0.5, (400, 300)), (0.2, (200, 150)),
                   (0.01, (100, 75)), (3.0, (800, 600))],
)  # fmt: skip
def test_a_jpeg_is_shrunk_while_it_is_decoded_where_a_part_is_enough(part, size):
    sample = stored(jpg=photo(800, 600))
    assert decode_picture(sample, PictureRule(shrink=lambda width, height: part)).size == size
    png = stored(png=encoded(Image.new("RGB", (800, 600)), "PNG"))
    assert decode_picture(png, PictureRule(shrink=lambda width, height: part)).size == (800, 600)


def test_a_truncated_jpeg_is_bad_when_shrunk_too():
    with pytest.raises(BadSampleError, match="truncated"):
        decode_picture(
            stored(jpg=photo(800, 600)[:-2000]), PictureRule(shrink=lambda width, height: 0.1)
        )
