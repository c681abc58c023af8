"""`preprocessor_config.json` of Hugging Face's image processors, to OpenCLIP's preprocess_cfg and
back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel_clip.data.samples.transforms import OPENAI_MEAN, OPENAI_STD, Preprocess
from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object

Json = dict[str, Any]

PREPROCESSOR_CONFIG = "preprocessor_config.json"
# What transformers 5 writes of a whole processor, with the image processor's part inside.
PROCESSOR_CONFIG = "processor_config.json"

# PIL's numbers of what OpenCLIP has.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS = ("do_resize", "do_rescale", "do_normalize")
# What each class takes for a key that is not there.
_DEFAULTS: dict[str, Json] = {
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    },
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}
_SHARED_DEFAULTS: Json = {"resample": 3, "rescale_factor": 1 / 255} | dict.fromkeys(_STEPS, True)


def read_processor(
    folder: Path, image_size: int, *, siglip: bool
) -> tuple[Path | None, Json | None]:
    """The file of a CLIPModel's or SiglipModel's folder that says how pictures are prepared, as
    transformers would take it, and OpenCLIP's preprocess_cfg. Without such a file: None, and
    SigLIP's usual preprocessing for a SiglipModel, none for a CLIPModel, whose is OpenCLIP's usual.

    Raises:
        InputError: a file is damaged, or as in `preprocess_from_processor`.
    """
    file = folder / PROCESSOR_CONFIG
    config = read_json_object(file).get("image_processor") if file.exists() else None
    if config is None:
        file = folder / PREPROCESSOR_CONFIG
        config = read_json_object(file) if file.exists() else None
    if config is None and not siglip:
        return None, None
    if config is None:
        file, config = None, {"size": {"height": image_size, "width": image_size}}
    if not isinstance(config, Mapping):
        raise InputError(f"{file}: image_processor must be a JSON object, not {config!r}")
    return file, preprocess_from_processor(config, image_size, str(file), siglip=siglip)


def preprocess_from_processor(
    config: Mapping[str, Any], image_size: int, where: str, *, siglip: bool
) -> Json:
    """OpenCLIP's preprocess_cfg of an image processor's config, for a model that takes pictures of
    `image_size`. siglip: the model is a SiglipModel, whose processor one without a type is; `where`
    is for messages.

    Raises:
        InputError: it is another processor than CLIP's or SigLIP's, or does what OpenCLIP's
            preprocessing cannot.
    """
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    is_siglip = siglip if name is None else str(name).startswith("Siglip")
    kind = "Siglip" if is_siglip else "CLIP"
    known = {f"{kind}{end}" for end in ("ImageProcessor", "ImageProcessorFast", "FeatureExtractor")}
    if name is not None and str(name).removesuffix("Pil") not in known:
        raise InputError(
            f"{where} is of a {name}; parallel_clip reads those of CLIPImageProcessor and "
            "SiglipImageProcessor"
        )
    given = {key: value for key, value in config.items() if value is not None}
    values = _SHARED_DEFAULTS | _DEFAULTS[f"{kind}ImageProcessor"] | given
    for step in _STEPS:
        if values[step] is not True:
            raise InputError(f"{where}: {step} must be true, as OpenCLIP's preprocessing does it")
    factor = values["rescale_factor"]
    if not _is_number(factor) or not abs(factor * 255 - 1) <= 1e-6:
        raise InputError(f"{where}: rescale_factor must be 1/255, not {factor!r}")
    resample = values["resample"]
    if not _is_number(resample) or resample not in _RESAMPLE:
        raise InputError(
            f"{where}: resample {resample!r} is not supported; use 3 (bicubic) or 2 (bilinear)"
        )
    return {
        "size": image_size,
        "mean": _three_numbers(values, "image_mean", where),
        "std": _three_numbers(values, "image_std", where),
        "interpolation": _RESAMPLE[resample],
        "resize_mode": _resize_mode(values, image_size, where),
    }


def _three_numbers(values: Json, key: str, where: str) -> list[float]:
    """One for each colour; transformers takes a single number for all of them."""
    given = values[key]
    numbers = [given] * 3 if _is_number(given) else given
    if not isinstance(numbers, list | tuple) or len(numbers) != 3:
        raise InputError(f"{where}: {key} must be three numbers or one, not {given!r}")
    if not all(map(_is_number, numbers)):
        raise InputError(f"{where}: {key} must be three numbers or one, not {given!r}")
    return list(numbers)


def _is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _resize_mode(values: Json, image_size: int, where: str) -> str:
    size, crops = values["size"], values["do_center_crop"]
    if isinstance(size, int):  # as files of before 2022 have it
        size = {"shortest_edge": size}
    whole = {"height": image_size, "width": image_size}
    if crops and _square(values.get("crop_size")) not in (None, whole):
        raise InputError(
            f"{where}: crop_size {values['crop_size']} is not the {image_size} pixels of the model"
        )
    if crops and size == {"shortest_edge": image_size}:
        return "shortest"
    if size == whole:
        return "squash"
    raise InputError(
        f"{where}: size {size} with do_center_crop {crops} is neither a resize of the shortest "
        f"edge to the model's {image_size} pixels and a crop to the middle, nor a resize to "
        f"{image_size} x {image_size} pixels, which OpenCLIP's preprocessing can do"
    )


def _square(size: Any) -> Any:
    return {"height": size, "width": size} if isinstance(size, int) else size


def processor_from_preprocess(preprocess: Preprocess, siglip: bool) -> Json:
    """`preprocessor_config.json` for a CLIPModel or a SiglipModel.

    Raises:
        InputError: the preprocessing is one that Hugging Face's processors cannot do.
    """
    height, width = preprocess.image_size
    if preprocess.resize_mode == "longest":
        raise InputError(
            "preprocess_cfg.resize_mode is 'longest', and Hugging Face's image processors of CLIP "
            "and SigLIP cannot do that; --to openclip keeps it"
        )
    crops = preprocess.resize_mode == "shortest"
    # SigLIP's processor has no crop.
    kind = "Siglip" if siglip and not crops else "CLIP"
    config: Json = {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{'Siglip' if siglip else 'CLIP'}Processor",
        **dict.fromkeys((*_STEPS, "do_convert_rgb"), True),
        "size": {"shortest_edge": height} if crops else {"height": height, "width": width},
        "resample": 2 if preprocess.interpolation == "bilinear" else 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
    if kind == "CLIP":
        config |= {"do_center_crop": crops, "crop_size": {"height": height, "width": width}}
    return config
