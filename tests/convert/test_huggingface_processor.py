"""Preprocessing of pictures: what is read, what is written, and pixels equal to transformers'."""

import json

import pytest
import torch
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from parallel_clip.convert.huggingface_processor import (
    preprocess_from_processor,
    processor_from_preprocess,
)
from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform
from parallel_clip.errors import InputError
from tests.convert.huggingface_models import picture

CLIP, SIGLIP = (
    {"image_processor_type": "CLIPImageProcessor"},
    {"image_processor_type": "SiglipImageProcessor"},
)


def read(config: dict, image_size: int = 224) -> Preprocess:
    settings = preprocess_from_processor(config, image_size, "preprocessor_config.json")
    return Preprocess.from_openclip((image_size, image_size), settings)


SETTINGS = [
    Preprocess((32, 32)),
    Preprocess((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"),
    Preprocess((32, 32), resize_mode="squash", interpolation="bilinear"),
    Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "squash"),
]


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("preprocess", SETTINGS, ids=str)
def test_written_and_read_back_with_the_same_pixels(preprocess, siglip):
    config = json.loads(json.dumps(processor_from_preprocess(preprocess, siglip)))
    assert read(config, 32) == preprocess
    assert config["processor_class"] == ("SiglipProcessor" if siglip else "CLIPProcessor")
    kind = config["image_processor_type"]
    theirs = {"CLIPImageProcessor": CLIPImageProcessorPil}.get(kind, SiglipImageProcessorPil)
    for size in ((90, 70), (40, 100), (32, 32), (20, 25)):
        image = picture(size=size)
        found = theirs(**config)(image, return_tensors="pt")["pixel_values"][0]
        expected = evaluation_transform(preprocess)(image)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5, size


@pytest.mark.parametrize("processor", [CLIPImageProcessor, SiglipImageProcessor])
def test_what_transformers_saves_is_read(tmp_path, processor):
    processor().save_pretrained(tmp_path)
    found = read(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    if processor is CLIPImageProcessor:
        assert found == Preprocess((224, 224))
    else:
        halves = (0.5,) * 3
        assert found == Preprocess((224, 224), halves, halves, "bicubic", "squash")


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, Preprocess((224, 224))),
        (CLIP, Preprocess((224, 224))),
        (SIGLIP, Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, resize_mode="squash")),
        # OpenAI's files of 2021.
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224,
             "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3},
            Preprocess((224, 224)),
        ),
        (
            CLIP | {"resample": 2, "image_std": None},
            Preprocess((224, 224), interpolation="bilinear"),
        ),
        ({"image_processor_type": "SiglipImageProcessorFast", "do_convert_rgb": None},
         Preprocess((224, 224), (0.5,) * 3, (0.5,) * 3, resize_mode="squash")),
    ],
)  # fmt: skip
def test_what_is_left_out_is_as_transformers_takes_it(config, expected):
    assert read(config) == expected


@pytest.mark.parametrize(
    "config, told",
    [
        ({"image_processor_type": "ViTImageProcessor"}, "of a ViTImageProcessor; .* CLIPImage"),
        ({"image_processor_type": 3}, "of a 3"),
        (CLIP | {"do_resize": False}, "do_resize must be true"),
        (CLIP | {"do_normalize": False}, "do_normalize must be true"),
        (CLIP | {"rescale_factor": 1.0}, "rescale_factor must be 1/255, not 1.0"),
        (CLIP | {"resample": 0}, "resample 0 is not supported"),
        (CLIP | {"size": {"shortest_edge": 256}}, "'shortest_edge': 256.*224 pixels"),
        (CLIP | {"crop_size": 200}, "crop_size 200 is not the 224"),
        (CLIP | {"do_center_crop": False}, "with do_center_crop False is neither"),
        (SIGLIP | {"size": {"height": 224, "width": 112}}, "is neither a resize"),
    ],
)
def test_what_openclip_cannot_do_is_refused(config, told):
    with pytest.raises(InputError, match=told):
        read(config)


def test_padding_cannot_be_said_to_transformers():
    with pytest.raises(InputError, match="resize_mode is 'longest'.*--to openclip keeps it"):
        processor_from_preprocess(Preprocess((32, 32), resize_mode="longest"), False)


def test_pixels_of_the_default_processor_are_near():
    """transformers resizes on tensors where it can: a level or two of 255 apart."""
    preprocess = SETTINGS[0]
    config = processor_from_preprocess(preprocess, False)
    found = CLIPImageProcessor(**config)(picture(), return_tensors="pt")["pixel_values"][0]
    expected = evaluation_transform(preprocess)(picture())
    assert torch.quantile((found - expected).abs(), 0.99) < 2 / 255 / min(preprocess.std)
