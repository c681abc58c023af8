"""Which caption and which picture a position trains with, against open_clip's pipeline."""

import io
import json
from collections import Counter

import open_clip
import pytest
import torch
import webdataset
from PIL import Image

from parallel_clip.config import config_from_dict
from parallel_clip.data.feeding.loader import RankBatchSlice, TrainingLoader
from parallel_clip.data.feeding.open import build_training_data, check_samples
from parallel_clip.data.feeding.run_shards import find_run_shards
from parallel_clip.data.samples.tokenizer import ClipTokenizer
from parallel_clip.data.samples.transforms import Preprocess, normalize
from parallel_clip.data.storage.progress import print_nothing
from parallel_clip.errors import InputError
from tests.data.shard_files import picture, write_shard, write_shards

TOKENIZER = ClipTokenizer(12)


def run_shards(*sources, seed=0, **data):
    train = [source if isinstance(source, dict) else {"shards": str(source)} for source in sources]
    tree = {"train": {"steps": 1}, "seed": seed, "data": {"train": train, **data}}
    config = config_from_dict(tree)
    return config, find_run_shards(config, print_nothing)


def open_data(*sources, **data):
    return build_training_data(*run_shards(*sources, **data), Preprocess((16, 16)), TOKENIZER)


def row(caption: str) -> tuple[int, ...]:
    """The tokens of open_clip's own tokenizer."""
    return tuple(open_clip.SimpleTokenizer()([caption], context_length=12)[0].tolist())


def used(*sources, count=64, **data) -> Counter[tuple[int, ...]]:
    return Counter(map(tuple, open_data(*sources, **data)[range(count)].tokens.tolist()))


TEXTS = [
    "Menu\nTomato soup\n$12.99",
    "one\r\ntwo\r\n",
    "\n\n  leading &amp;amp; trailing \n",
    "tab\tand\x0bothers\u2028here",
    "日本\n犬",
    "long " * 40 + "\nend",
]


@pytest.mark.parametrize("augment", ["train", "none"])
def test_the_caption_is_the_text_that_openclip_trains_on(tmp_path, augment):
    samples = {f"{n}": {"jpg": picture(n), "txt": text.encode()} for n, text in enumerate(TEXTS)}
    path = write_shard(tmp_path / "a.tar", samples)
    theirs = webdataset.WebDataset(str(path), shardshuffle=False).decode("pilrgb")
    expected = {sample["__key__"]: row(sample["txt"]) for sample in theirs}
    batch = open_data(tmp_path, augment=augment)[range(len(TEXTS))]
    found = {
        address.key: tuple(tokens.tolist())
        for address, tokens in zip(batch.addresses, batch.tokens, strict=True)
    }
    assert found == expected and len(set(found.values())) == len(TEXTS)


CAPTIONS = [f"caption {letter}" for letter in "abcd"]


@pytest.fixture
def several(tmp_path):
    """64 samples with four lines and, in JSON, two captions at `alt` and one at `caption`."""
    facts = json.dumps({"alt": ["x", "y"], "caption": "z"}).encode()
    files = {"jpg": picture(0), "txt": "\n".join(CAPTIONS).encode(), "json": facts}
    write_shard(tmp_path / "a.tar", {f"{number:02d}": files for number in range(64)})
    return tmp_path


def test_lines_are_captions_where_that_is_asked_for(several):
    assert used(several) == {row("\n".join(CAPTIONS)): 64}
    assert used(several, caption_lines=True, augment="none") == {row("caption a"): 64}
    assert used(several, caption_key="alt", augment="none") == {row("x"): 64}
    drawn = used(several, caption_lines=True)
    assert set(drawn) == set(map(row, CAPTIONS)) and min(drawn.values()) > 6
    assert used(several, caption_lines=True) == drawn != used(several, caption_lines=True, seed=1)


def test_several_captions_of_a_picture_are_rows_that_follow_one_another(several):
    """Alike in every layout, with workers or without; the picture is that of one caption."""
    options = {"caption_lines": True, "captions_per_image": 3}
    data, alone = open_data(several, **options), open_data(several, caption_lines=True)
    whole = data[range(64)]
    assert torch.equal(whole.images, alone[range(64)].images)
    of_pictures = whole.tokens.view(64, 3, -1)
    assert torch.equal(of_pictures[:, 0], alone[range(64)].tokens)
    for rows in of_pictures.tolist():
        assert len(set(map(tuple, rows)) & set(map(row, CAPTIONS))) == 3
    for rank in range(2):
        for step in TrainingLoader(data, RankBatchSlice(32, 8, rank, 2), 0, 2, workers=1):
            for batch in step:
                expected = of_pictures[batch.positions].flatten(0, 1)
                assert torch.equal(batch.tokens, expected) and len(batch.images) == 8
    first = open_data(several, **options | {"captions_per_image": 6}, augment="none")[range(1)]
    expected = [row(f"caption {letter}") for letter in "abcdab"]
    assert list(map(tuple, first.tokens.tolist())) == expected


def test_several_captions_are_asked_for_where_samples_have_one(tmp_path):
    write_shard(tmp_path / "a.tar", {"0": {"jpg": picture(0), "txt": b"one\n", "json": b"{}"}})
    config, shards = run_shards(tmp_path, caption_lines=True, captions_per_image=2)
    with pytest.raises(InputError, match="2: none of the first 1 samples has more than one capt"):
        check_samples(config, shards)
    write_shard(tmp_path / "b.tar", {"0": {"jpg": picture(0), "txt": b"one\ntwo"}})
    both = tmp_path / "a.tar", tmp_path / "b.tar"
    check_samples(*run_shards(*both, caption_lines=True, captions_per_image=2))


def test_a_source_has_its_own_rule(tmp_path):
    files = {"jpg": picture(0), "txt": b"one\ntwo", "json": b'{"alt": "three"}'}
    for name in "abcd":
        write_shard(tmp_path / f"{name}.tar", {"0": files})
    sources = [
        {"shards": str(tmp_path / "a.tar")},
        {"shards": str(tmp_path / "b.tar"), "caption_lines": True},
        {"shards": str(tmp_path / "c.tar"), "caption_lines": False},
        {"shards": str(tmp_path / "d.tar"), "caption_key": {"alt": 2, "none": 1}},
    ]
    expected = {False: ["one two", "one", "one two", "three"]}
    expected[True] = ["one", "one", "one two", "three"]
    for lines, captions in expected.items():
        batch = open_data(*sources, caption_lines=lines, augment="none")[range(4)]
        for address, tokens in zip(batch.addresses, batch.tokens, strict=True):
            assert tuple(tokens.tolist()) == row(captions[address.source])


def test_keys_are_drawn_alike_in_every_layout(several):
    keys = {"alt": 0.5, "caption": 0.5}
    data = open_data(several, caption_key=keys)
    whole = data[range(64)]
    times = Counter(map(tuple, whole.tokens.tolist()))
    # Of 64 draws 32 are of a key, and 16 of each of two captions: within 4 deviations.
    assert abs(times[row("z")] - 32) < 16 and abs(times[row("x")] - 16) < 14
    assert sum(times[row(text)] for text in "xyz") == 64
    for rank in range(2):
        for step in TrainingLoader(data, RankBatchSlice(32, 8, rank, 2), 0, 2, workers=1):
            for batch in step:
                assert torch.equal(batch.tokens, whole.tokens[batch.positions])


def test_an_empty_text_is_trained_with_where_that_is_asked_for(tmp_path):
    samples = {
        "empty": {"jpg": picture(0), "txt": b" \n"},
        "good": {"jpg": picture(1), "txt": b"a"},
    }
    write_shard(tmp_path / "a.tar", samples)
    assert used(tmp_path, count=2) == {row("a"): 2}
    assert used(tmp_path, count=2, empty_caption="keep") == {row("a"): 1, row(""): 1}


def long_picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_long_picture_is_bad_only_where_the_transform_makes_it_large(tmp_path):
    """16 pixels high, a picture of 2,000 x 1 has 512,000."""
    write_shard(
        tmp_path / "a.tar",
        {
            "long": {"png": long_picture(2000, 1), "txt": b"a"},
            "b": {"jpg": picture(0), "txt": b"b"},
        },
    )
    assert not open_data(tmp_path, max_pixels=2000)[range(2)].bad
    assert not open_data(tmp_path, max_pixels=512_000, augment="none")[range(2)].bad
    (bad,) = open_data(tmp_path, max_pixels=511_999, augment="none")[range(2)].bad
    assert bad.key == "long" and "32,000 x 16 pixels before it crops, at most 511,999" in bad.reason


def test_a_crop_may_be_larger_than_pillow_allows(tmp_path, monkeypatch, recwarn):
    write_shard(tmp_path / "a.tar", {"a": {"jpg": picture(0, (64, 48)), "txt": b"a"}})
    expected = open_data(tmp_path)[range(1)].images
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.new("RGB", (64, 48)).crop((0, 0, 60, 40))
    batch = open_data(tmp_path)[range(1)]
    assert torch.equal(batch.images, expected) and not batch.bad and not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_first_samples_are_checked_by_the_same_rules(tmp_path):
    write_shard(tmp_path / "a.tar", {"a": {"jpg": picture(0, (24, 18)), "txt": b""}})
    check_samples(*run_shards(tmp_path, empty_caption="keep", max_pixels=24 * 18))
    with pytest.raises(InputError, match=r"24 x 18 pixels, at most 431 \(data.max_pixels\)"):
        check_samples(*run_shards(tmp_path, empty_caption="keep", max_pixels=431))
    with pytest.raises(InputError, match="the caption is empty"):
        check_samples(*run_shards(tmp_path))
    with pytest.raises(InputError, match="no .json"):
        check_samples(*run_shards(tmp_path, caption_key={"a": 1, "b": 2}))


@pytest.mark.parametrize("augment", ["train", "none"])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((16, 16)),
        Preprocess((12, 16), mean=(0.5, 0.25, 0.1), std=(0.5, 0.3, 0.07), resize_mode="squash"),
        Preprocess((16, 16), resize_mode="longest"),
    ],
    ids=str,
)
def test_pictures_that_travel_as_bytes_have_the_same_bits(tmp_path, augment, preprocess):
    """Also with jitter of colours and grey ones, and of other modes than RGB."""
    write_shards(tmp_path / "data", [12])
    grey = {"jpg": picture_of_mode("L"), "txt": b"grey"}
    transparent = {"png": picture_of_mode("RGBA"), "txt": b"transparent"}
    write_shard(tmp_path / "data" / "000009.tar", {"g": grey, "t": transparent})
    options = {"color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.8}
    options |= {"gray_scale_prob": 0.3}
    images = {}
    for where in ("worker", "device"):
        settings = {"augment": augment, "augment_options": options, "normalize": where}
        run = run_shards(tmp_path / "data", **settings)
        images[where] = build_training_data(*run, preprocess, TOKENIZER)[range(28)].images
    assert images["device"].dtype == torch.uint8 and images["worker"].dtype == torch.float32
    assert torch.equal(normalize(images["device"], preprocess), images["worker"])


def picture_of_mode(mode: str) -> bytes:
    buffer = io.BytesIO()
    kind = "JPEG" if mode == "L" else "PNG"
    Image.open(io.BytesIO(picture(7))).convert(mode).save(buffer, kind)
    return buffer.getvalue()
