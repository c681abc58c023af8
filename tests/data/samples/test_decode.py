import io
import json

import numpy as np
import pytest
from PIL import Image

from parallel_clip.data.samples import decode
from parallel_clip.data.samples.decode import captions_of, decode_picture, label_of
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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    image = Image.open(io.BytesIO(picture(0))).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    decoded = decode_picture(stored(png=data))
    assert decoded.mode == "RGB"
    assert np.array_equal(decoded, Image.open(io.BytesIO(data)).convert("RGB"))


def truncated(kind: str, cut: int) -> bytes:
    return picture(0, (64, 64), kind)[:-cut]


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "no picture, only nothing"),
        ({"txt": b"a"}, "no picture, only .txt"),
        ({"gif": b"GIF89a"}, "no picture, only .gif"),
        ({"jpg": b""}, "not a JPEG, PNG, WEBP file"),
        ({"jpg": encoded(Image.new("RGB", (8, 8)), "GIF")}, "not a JPEG"),
        ({"jpg": encoded(Image.new("RGB", (8, 8)), "BMP")}, "not a JPEG"),
        ({"jpg": truncated("JPEG", 1)}, "truncated"),
        ({"jpg": truncated("JPEG", 2000)}, "truncated"),
        ({"png": truncated("PNG", 2000)}, "cannot be decoded"),
        ({"webp": truncated("WEBP", 500)}, "cannot be decoded"),
        ({"png": encoded(Image.new("1", (12000, 9000)), "PNG")}, "12,000 x 9,000 pixels"),
        ({"png": encoded(Image.new("1", (20000, 20000)), "PNG")}, "cannot be decoded.*400000000"),
        ({"png": encoded(Image.new("1", (101, 1)), "PNG")}, "101 x 1, at most 100 times"),
    ],
)
def test_bad_pictures(files, reason, recwarn):
    with pytest.raises(BadSampleError, match=reason) as caught:
        decode_picture(stored(**files))
    assert caught.value.key == "key"
    assert not recwarn.list


def test_a_picture_of_too_many_bytes(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PICTURE_BYTES", 100)
    with pytest.raises(BadSampleError, match="bytes, at most 100"):
        decode_picture(stored(jpg=picture(0)))


@pytest.mark.parametrize(
    "text, captions",
    [
        ("a dog", ["a dog"]),
        ("a dog\n", ["a dog"]),
        ("a dog\r\n  two dogs\n\n \n", ["a dog", "  two dogs"]),
        ("犬 🐶\u2028one caption\x0bstill", ["犬 🐶\u2028one caption\x0bstill"]),
    ],
)
def test_captions_are_the_lines_of_txt(text, captions):
    assert captions_of(stored(txt=text.encode())) == captions


@pytest.mark.parametrize(
    "value, captions", [("a\nb", ["a\nb"]), (["a", " ", "b"], ["a", "b"]), (["a"], ["a"])]
)
def test_captions_of_json(value, captions):
    record = json.dumps({"caption": value, "other": 1}).encode()
    assert captions_of(stored(json=record, txt=b"not this"), "caption") == captions


@pytest.mark.parametrize(
    "files, key, reason",
    [
        ({"jpg": b""}, None, "no .txt, only .jpg"),
        ({"txt": b""}, None, "caption is empty"),
        ({"txt": b" \n\t\n"}, None, "caption is empty"),
        ({"txt": b"caf\xe9"}, None, "not UTF-8"),
        ({"txt": b"a" * 70_000}, None, "70,000 bytes, at most 65,536"),
        ({"txt": b"a"}, "caption", "no .json, only .txt"),
        ({"json": b"{"}, "caption", "cannot be read"),
        ({"json": b"[" * 100_000}, "caption", "cannot be read"),
        ({"json": b"[1]"}, "caption", "no text, or list of texts, at 'caption'"),
        ({"json": b'{"caption": 3}'}, "caption", "no text, or list of texts"),
        ({"json": b'{"caption": ["a", 3]}'}, "caption", "no text, or list of texts"),
        ({"json": b'{"caption": []}'}, "caption", "caption is empty"),
        ({"json": b'{"caption": "%s"}' % (b"a" * 70_000)}, "caption", "a caption of 70,000"),
    ],
)
def test_bad_captions(files, key, reason):
    with pytest.raises(BadSampleError, match=reason):
        captions_of(stored(**files), key)


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
    assert decode_picture(sample, lambda width, height: part).size == size
    png = stored(png=encoded(Image.new("RGB", (800, 600)), "PNG"))
    assert decode_picture(png, lambda width, height: part).size == (800, 600)


def test_a_truncated_jpeg_is_bad_when_shrunk_too():
    with pytest.raises(BadSampleError, match="truncated"):
        decode_picture(stored(jpg=photo(800, 600)[:-2000]), lambda width, height: 0.1)
