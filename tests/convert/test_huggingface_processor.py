"""Preprocessing of pictures: what is read, what is written, and pixels equal to transformers'."""

import json
from itertools import product

import pytest
import torch
from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from parallel_clip.convert.huggingface_processor import (
    preprocess_from_processor,
    processor_from_preprocess,
    read_processor,
)
from parallel_clip.data.samples.transforms import Preprocess, evaluation_transform
from parallel_clip.errors import InputError
from tests.convert.huggingface_models import picture

CLIP, SIGLIP = (
    {"image_processor_type": "CLIPImageProcessor"},
    {"image_processor_type": "SiglipImageProcessor"},
)


def read(config: dict, image_size: int = 224, siglip: bool = False) -> Preprocess:
    where = "preprocessor_config.json"
    settings = preprocess_from_processor(config, image_size, where, siglip=siglip)
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
        (CLIP | {"rescale_factor": float("nan")}, "rescale_factor must be 1/255, not nan"),
        (CLIP | {"resample": 0}, "resample 0 is not supported"),
        (CLIP | {"resample": [3]}, r"resample \[3\] is not supported"),
        (CLIP | {"resample": {}}, "resample {} is not supported"),
        (CLIP | {"image_mean": [0.5]}, r"image_mean must be three numbers or one, not \[0.5\]"),
        (CLIP | {"image_mean": True}, "image_mean must be three numbers or one, not True"),
        (CLIP | {"image_mean": "abc"}, "image_mean must be three numbers or one, not 'abc'"),
        (CLIP | {"image_std": {"a": 1}}, "image_std must be three numbers or one"),
        (CLIP | {"image_std": [float("nan"), 1, 1]}, "image_std must be three numbers or one"),
        (CLIP | {"image_std": 0}, "std .* expected numbers above 0"),
        (CLIP | {"size": {"shortest_edge": 256}}, "'shortest_edge': 256.*224 pixels"),
        (CLIP | {"crop_size": 200}, "crop_size 200 is not the 224"),
        (CLIP | {"do_center_crop": False}, "with do_center_crop False is neither"),
        (SIGLIP | {"size": {"height": 224, "width": 112}}, "is neither a resize"),
    ],
)
def test_what_openclip_cannot_do_is_refused(config, told):
    with pytest.raises(InputError, match=told):
        read(config)


OWN = CLIP | {"size": {"shortest_edge": 32}, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3]}
NESTED = OWN | {"image_mean": [0.4, 0.5, 0.6], "resample": 2}
UNTYPED = {"size": {"height": 32, "width": 32}}

# The files of a folder: what transformers takes of them is the reference.
FOLDERS = {
    "its own file": ({"preprocessor": OWN}, False),
    "one of the whole processor": ({"processor": {"image_processor": NESTED}}, False),
    "both": ({"preprocessor": OWN, "processor": {"image_processor": NESTED}}, False),
    "both, one of texts alone": ({"preprocessor": OWN, "processor": {"a": 1}}, False),
    "both, one with null": ({"preprocessor": OWN, "processor": {"image_processor": None}}, False),
    "one number for all colours": (
        {"preprocessor": OWN | {"image_mean": 0.4, "image_std": 0.2}},
        False,
    ),
    "CLIP's without a type": ({"preprocessor": UNTYPED | {"do_center_crop": False}}, False),
    "SigLIP's without a type": ({"preprocessor": UNTYPED}, True),
    "SigLIP's with a type of null": (
        {"preprocessor": UNTYPED | {"image_processor_type": None}},
        True,
    ),
    "CLIP's in SigLIP": ({"preprocessor": OWN}, True),
}


@pytest.mark.parametrize("files, siglip", FOLDERS.values(), ids=FOLDERS)
def test_of_a_folder_what_transformers_takes_is_taken(tmp_path, files, siglip):
    for name, content in files.items():
        (tmp_path / f"{name}_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "siglip" if siglip else "clip"})
    )
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    _, found = read_processor(tmp_path, 32, siglip=siglip)
    for key, ours in (("image_mean", found["mean"]), ("image_std", found["std"])):
        expected = getattr(theirs, key)
        assert ours == ([expected] * 3 if isinstance(expected, float) else list(expected))
    assert found["interpolation"] == {2: "bilinear", 3: "bicubic"}[int(theirs.resample)]
    ours = evaluation_transform(Preprocess.from_openclip((32, 32), found))(picture())
    pixels = theirs(picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.quantile((pixels - ours).abs(), 0.99) < 2 / 255 / min(found["std"])


def test_without_a_file_it_is_what_is_usual_for_the_model(tmp_path):
    assert read_processor(tmp_path, 32, siglip=False) == (None, None)
    file, found = read_processor(tmp_path, 32, siglip=True)
    halves = (0.5,) * 3
    assert file is None
    assert Preprocess.from_openclip((32, 32), found) == Preprocess(
        (32, 32), halves, halves, "bicubic", "squash"
    )


@pytest.mark.parametrize(
    "name, content",
    [
        *product(
            ["preprocessor_config.json", "processor_config.json"],
            ["[1]", "{", "[" * 100_000, None],
        ),
        ("processor_config.json", '{"image_processor": [1]}'),
    ],
    ids=range(9),
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}(:| cannot be read)"):
        read_processor(tmp_path, 32, siglip=False)


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
