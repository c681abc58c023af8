import io
import json
import pickle
import random

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms as T

from parallel_clip.data.samples.decode import PictureRule, decode_picture
from parallel_clip.data.samples.transforms import (
    Preprocess,
    evaluation_resized,
    evaluation_shrink,
    evaluation_transform,
    sample_seed,
    seeded,
    training_shrink,
    training_transform,
)
from parallel_clip.data.storage.shards import StoredSample
from parallel_clip.errors import InputError

PICTURES = [(64, 48), (48, 64), (32, 32), (31, 200), (200, 33), (20, 17), (333, 250)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(sum(size)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def of_openclip(preprocess: Preprocess, train: bool = False, options=None):
    settings = PreprocessCfg(**json.loads(json.dumps(preprocess.to_openclip())))
    return image_transform_v2(settings, is_train=train, aug_cfg=options)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("image_size", [(32, 32), (40, 24), (24, 40)])
def test_evaluation_equals_openclip(image_size, resize_mode, interpolation):
    preprocess = Preprocess(
        image_size,
        interpolation=interpolation,
        resize_mode=resize_mode,
        fill_color=7,
        mean=(0.5, 0.4, 0.3),
    )
    ours, theirs = evaluation_transform(preprocess), of_openclip(preprocess)
    for size in PICTURES:
        for mode in ("RGB", "L"):
            result = ours(picture(size, mode))
            assert result.shape == (3, *image_size) and result.dtype == torch.float32
            assert torch.equal(result, theirs(picture(size, mode))), (size, mode)


@pytest.mark.filterwarnings("ignore:Unused augmentation")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": [0.3, 0.8]},
        {"color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.5},
        {
            "scale": (0.5, 1.0),
            "color_jitter": (0.4, 0.4, 0.4, 0.1),
            "color_jitter_prob": 0.8,
            "gray_scale_prob": 0.5,
            "use_timm": False,
            "re_prob": None,
        },
    ],
)
def test_training_equals_openclip(options):
    preprocess = Preprocess((32, 32))
    ours, theirs = training_transform(preprocess, options), of_openclip(preprocess, True, options)
    different = set()
    for number in range(20):
        with seeded(number):
            result = ours(picture((64, 48)))
        with seeded(number):
            assert torch.equal(result, theirs(picture((64, 48))))
        different.add(result.sum().item())
    assert len(different) > 10


LONG = [(300, 1), (1, 300), (900, 3), (2, 601), (7, 1001)]


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("image_size", [(32, 32), (40, 24)])
def test_evaluation_of_long_pictures_equals_openclip(image_size, resize_mode):
    preprocess = Preprocess(image_size, resize_mode=resize_mode)
    ours, theirs = evaluation_transform(preprocess), of_openclip(preprocess)
    for size in LONG:
        assert torch.equal(ours(picture(size)), theirs(picture(size))), size


@pytest.mark.filterwarnings("ignore:Unused augmentation")
@pytest.mark.parametrize("options", [{}, {"scale": [0.1, 0.4]}])
def test_training_with_long_pictures_equals_openclip(options):
    preprocess = Preprocess((32, 32))
    ours, theirs = training_transform(preprocess, options), of_openclip(preprocess, True, options)
    for number, size in enumerate(LONG * 2):
        with seeded(number):
            result = ours(picture(size))
        with seeded(number):
            assert torch.equal(result, theirs(picture(size))), size


@pytest.mark.parametrize("image_size", [(32, 32), (40, 24), (24, 40)])
def test_the_size_before_the_crop_is_that_of_openclips_resize(image_size):
    preprocess = Preprocess(image_size)
    resize, resized = of_openclip(preprocess).transforms[0], evaluation_resized(preprocess)
    for size in PICTURES + LONG:
        theirs = resize(picture(size)).size
        assert resized(*size) == pytest.approx(theirs, abs=1), size
    assert evaluation_resized(Preprocess(image_size, resize_mode="squash")) is None
    assert evaluation_resized(Preprocess(image_size, resize_mode="longest")) is None


def test_the_ratio_of_the_crop_is_heeded():
    wide = training_transform(Preprocess((8, 8)), {"ratio": [3.9, 4.0], "scale": [0.2, 0.2]})
    with seeded(0):
        _, _, height, width = wide.transforms[0].get_params(
            picture((100, 100)), wide.transforms[0].scale, wide.transforms[0].ratio
        )
    assert 3.5 < width / height < 4.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_timm": True}, "use_timm is not supported"),
        ({"re_prob": 0.2}, "re_prob is not supported"),
        ({"interpolation": "bilinear"}, "interpolation is not supported; there are scale"),
        ({"scale": [0.9]}, "expected 2 numbers"),
        ({"scale": [0.9, 0.2]}, "expected 0 < a <= b"),
        ({"ratio": "square"}, "expected 2 numbers"),
        ({"gray_scale_prob": 2}, "expected 0 to 1"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.1]}, "go together"),
        ({"color_jitter_prob": 0.5}, "go together"),
        ({"color_jitter": 0.4, "color_jitter_prob": 0.5}, "expected 4 numbers"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.9], "color_jitter_prob": 0.5}, "color_jitter: hue"),
    ],
)
def test_options_that_are_not_supported_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        training_transform(Preprocess((8, 8)), options)


def test_preprocess_survives_openclips_names():
    preprocess = Preprocess((32, 24), mean=(0.1, 0.2, 0.3), resize_mode="squash", fill_color=3)
    settings = json.loads(json.dumps(preprocess.to_openclip()))
    assert Preprocess.from_openclip((32, 24), settings) == preprocess
    assert PreprocessCfg(**settings).size == [32, 24]


def test_preprocess_defaults_and_ranks():
    assert Preprocess.from_openclip((8, 8)) == Preprocess((8, 8))
    defaults = Preprocess.from_openclip((224, 224)).to_openclip()
    assert defaults == json.loads(json.dumps(vars(PreprocessCfg())))
    checkpoint = {"mean": [0.5] * 3, "std": 0.25, "size": 336, "resize_mode": "longest"}
    preprocess = Preprocess.from_openclip((8, 8), checkpoint, {"mean": None, "std": (1, 1, 2)})
    assert preprocess == Preprocess((8, 8), (0.5,) * 3, (1, 1, 2), resize_mode="longest")
    assert Preprocess.from_openclip((8, 8), None, checkpoint).std == (0.25,) * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "L"},
        {"mean": [0.5]},
        {"std": [0.5, 0.5, 0]},
        {"interpolation": "nearest"},
        {"resize_mode": "crop"},
        {"image_size": 8},
        {"crop_pct": 0.9},
        {"mean": [float("nan"), 0, 0]},
        {"std": [1, 1, float("inf")]},
        {"mean": [10**400, 0, 0]},
        {"interpolation": ["bicubic"]},
        {"fill_color": "x"},
        {"fill_color": 256},
        {"fill_color": [0, 0, 0]},
    ],
)
def test_settings_that_are_wrong(settings):
    with pytest.raises(InputError, match=f"preprocess_cfg.{next(iter(settings))}"):
        Preprocess.from_openclip((8, 8), settings)


def test_seeding_leaves_no_trace():
    torch.manual_seed(1)
    random.seed(1)
    before = torch.default_generator.get_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), seeded(5):
        torch.rand(3), random.random()
        1 / 0  # noqa: B018
    assert torch.equal(torch.default_generator.get_state(), before[0])
    assert random.getstate() == before[1]


def test_sample_seeds_differ_by_seed_position_and_purpose():
    seeds = {sample_seed(s, p, w) for s in range(5) for p in range(50) for w in ("crop", "caption")}
    assert len(seeds) == 500 and max(seeds) < 2**64


def test_transforms_can_be_sent_to_other_processes():
    options = {"color_jitter": [0.4] * 3 + [0.1], "color_jitter_prob": 0.5, "gray_scale_prob": 0.1}
    modes = ("shortest", "longest", "squash")
    transforms = [evaluation_transform(Preprocess((8, 9), resize_mode=mode)) for mode in modes]
    for transform in [training_transform(Preprocess((8, 8)), options), *transforms]:
        sent = pickle.loads(pickle.dumps(transform))
        with seeded(3):
            expected = transform(picture((64, 48)))
        with seeded(3):
            assert torch.equal(sent(picture((64, 48))), expected)


def test_openai_statistics_are_openclips():
    assert Preprocess((8, 8)).mean == open_clip.OPENAI_DATASET_MEAN
    assert Preprocess((8, 8)).std == open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(900, 700), (700, 900), (2000, 300), (230, 240)])
def test_what_is_enough_for_evaluation_is_no_less_than_the_model_sees(size, mode):
    preprocess = Preprocess((224, 224), resize_mode=mode)
    part = evaluation_shrink(preprocess)(*size)
    shrunk = [part * side for side in size]
    if mode == "longest":
        assert max(shrunk) == pytest.approx(224)
    else:
        assert min(shrunk) == pytest.approx(224)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(50, 3000),
    st.integers(50, 3000),
    st.floats(0.05, 1.0),
    st.integers(0, 10**6),
)
def test_what_is_enough_for_training_is_enough_for_every_crop(width, height, smallest, seed):
    options = {"scale": (smallest, 1.0), "ratio": (0.75, 4 / 3)}
    part = training_shrink(Preprocess((64, 64)), options)(width, height)
    torch.manual_seed(seed)
    picture = torch.empty(3, height, width, device="meta")
    ratio = width / height
    _, _, crop_height, crop_width = T.RandomResizedCrop.get_params(
        picture, list(options["scale"]), list(options["ratio"])
    )
    if 0.75 < ratio < 4 / 3:  # else a crop that does not fit is replaced by one in the middle
        assert crop_width * part >= 64 - part - 1e-6
        assert crop_height * part >= 64 - part - 1e-6


def test_shrinking_changes_little():
    across, down = np.meshgrid(np.linspace(0, 6, 1200), np.linspace(0, 9, 900))
    pixels = 127 + 60 * np.stack([np.sin(across + down), np.cos(down), np.sin(across - down)], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG")
    sample = StoredSample("key", {"jpg": buffer.getvalue()})
    preprocess = Preprocess((64, 64))
    exact = evaluation_transform(preprocess)(decode_picture(sample))
    shrunk = decode_picture(sample, PictureRule(shrink=evaluation_shrink(preprocess)))
    fast = evaluation_transform(preprocess)(shrunk)
    assert shrunk.size == (150, 113)
    assert (exact - fast).abs().mean() < 0.03
