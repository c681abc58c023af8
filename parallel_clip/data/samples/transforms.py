"""Transforms of RGB pictures to the tensors that a model takes: OpenCLIP's, to the bit."""

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torchvision.transforms.functional as F
from PIL.Image import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from parallel_clip.data.order.permutation import name_to_int
from parallel_clip.data.samples.decode import DraftScale, ResizedSize
from parallel_clip.errors import InputError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

DEFAULT_SCALE, DEFAULT_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # of the training crop

_CHOICES = {
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}

Transform = Callable[[Image], Tensor]  # -> float32 [3, H, W]


@dataclass(frozen=True)
class Preprocess:
    """The settings of the evaluation transform, with the names of OpenCLIP's preprocess_cfg.

    `interpolation` "random" means bicubic here, as it does in OpenCLIP.
    """

    image_size: tuple[int, int]  # height, width
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0  # of what is added around a picture, by "longest" only

    @classmethod
    def from_openclip(
        cls, image_size: tuple[int, int], *settings: Mapping[str, Any] | None
    ) -> "Preprocess":
        """From preprocess_cfg dicts, later ones first in rank, None and null values left out.

        The size is that of the model, whatever the dicts say, as in OpenCLIP.
        """
        merged: dict[str, Any] = {}
        for setting in settings:
            merged |= {key: value for key, value in (setting or {}).items() if value is not None}
        merged.pop("size", None)
        if merged.pop("mode", "RGB") != "RGB":
            raise InputError("preprocess_cfg.mode must be RGB: pictures have three colours")
        for key, value in merged.items():
            if key in ("mean", "std"):
                three = [float(value)] * 3 if _is_number(value) else value
                merged[key] = _numbers(f"preprocess_cfg.{key}", three, 3)
            elif key in _CHOICES and value not in _CHOICES[key]:
                raise InputError(f"preprocess_cfg.{key} is {value!r}: expected {_CHOICES[key]}")
            elif key == "fill_color" and not (type(value) is int and 0 <= value <= 255):
                raise InputError(f"preprocess_cfg.{key} is {value!r}: expected 0 to 255")
            elif key not in (*_CHOICES, "fill_color"):
                raise InputError(f"preprocess_cfg.{key} is not supported; remove it")
        if min(merged.get("std", OPENAI_STD)) <= 0:
            raise InputError(f"preprocess_cfg.std is {merged['std']}: expected numbers above 0")
        return cls(image_size, **merged)

    def __str__(self) -> str:
        mean, std = (" ".join(f"{x:.3g}" for x in three) for three in (self.mean, self.std))
        height, width = self.image_size
        return (
            f"{height} x {width} pixels by {self.interpolation}, resize {self.resize_mode}, "
            f"mean {mean}, std {std}"
        )

    def to_openclip(self) -> dict[str, Any]:
        """OpenCLIP's preprocess_cfg, ready for JSON."""
        height, width = self.image_size
        return {
            "size": height if height == width else [height, width],
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }


def evaluation_transform(preprocess: Preprocess, *, normalized: bool = True) -> Transform:
    """Resize and crop to the middle, the same for every call. To fp32 [3, H, W]; with `normalized`
    off, to the uint8 that `normalize` takes."""
    bilinear = preprocess.interpolation == "bilinear"
    interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
    size = list(preprocess.image_size)
    if preprocess.resize_mode == "squash":
        steps = [T.Resize(size, interpolation)]
    elif preprocess.resize_mode == "longest":
        steps = [
            partial(_resize_to_fit, size, max, interpolation),
            partial(_pad, size, preprocess.fill_color),
            T.CenterCrop(size),
        ]
    elif size[0] == size[1]:
        steps = [T.Resize(size[0], interpolation), T.CenterCrop(size)]
    else:
        # OpenCLIP resizes to a size that is not square with bicubic, whatever is asked.
        steps = [partial(_resize_to_fit, size, min, InterpolationMode.BICUBIC), T.CenterCrop(size)]
    return T.Compose([*steps, *_to_tensor(preprocess, normalized)])


def training_transform(
    preprocess: Preprocess, options: Mapping[str, Any], *, normalized: bool = True
) -> Transform:
    """A random crop, resized, with colour jitter and grey pictures where `options` ask for them;
    `normalized` as in `evaluation_transform`.

    `options` are those of OpenCLIP's aug_cfg that it has without timm: scale, ratio, color_jitter
    (brightness, contrast, saturation, hue) with color_jitter_prob, gray_scale_prob. Its training
    crop is always bicubic. Draws from torch's and Python's global generators: see `seeded`.
    """
    options = check_augment_options(options)
    steps: list[Callable] = [
        T.RandomResizedCrop(
            preprocess.image_size,
            scale=options.get("scale", DEFAULT_SCALE),
            ratio=options.get("ratio", DEFAULT_RATIO),
            interpolation=InterpolationMode.BICUBIC,
        )
    ]
    if "color_jitter" in options:
        jitter = T.ColorJitter(*options["color_jitter"])
        steps.append(partial(_sometimes, options["color_jitter_prob"], jitter))
    if "gray_scale_prob" in options:
        grey = T.Grayscale(num_output_channels=3)
        steps.append(partial(_sometimes, options["gray_scale_prob"], grey))
    return T.Compose([*steps, *_to_tensor(preprocess, normalized)])


def normalize(pictures: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 [b, 3, H, W] to fp32, on their device: the bits that the transforms give."""
    mean, std = (_three(numbers, pictures.device) for numbers in (preprocess.mean, preprocess.std))
    # By a tensor: on CUDA division by a number is a product with its reciprocal, which rounds
    # otherwise.
    most = _three((255.0, 255.0, 255.0), pictures.device)
    return pictures.float().div_(most).sub_(mean).div_(std)


@cache
def _three(numbers: tuple[float, float, float], device: torch.device) -> Tensor:
    """fp32 [3, 1, 1], made once: a copy to the device would wait for it."""
    return torch.tensor(numbers, dtype=torch.float32, device=device).view(3, 1, 1)


def check_augment_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `data.augment_options` that are set and not 0. InputError: unknown or wrong ones."""
    given = {key: value for key, value in options.items() if value is not None}
    for key in ("use_timm", "re_prob", "re_count"):
        if given.pop(key, None):
            raise InputError(f"data.augment_options.{key} is not supported: leave it out")
    lengths = {"scale": 2, "ratio": 2, "color_jitter": 4}
    known = [*lengths, "color_jitter_prob", "gray_scale_prob"]
    for key, value in given.items():
        if key not in known:
            raise InputError(
                f"data.augment_options.{key} is not supported; there are {', '.join(known)}"
            )
        if key in lengths:
            given[key] = _numbers(f"data.augment_options.{key}", value, lengths[key])
        elif not _is_number(value) or not 0 <= value <= 1:
            raise InputError(f"data.augment_options.{key} is {value!r}: expected 0 to 1")
    for key in ("scale", "ratio"):
        low, high = given.get(key, (1, 1))
        if not 0 < low <= high:
            raise InputError(f"data.augment_options.{key} is [{low}, {high}]: expected 0 < a <= b")
    given = {key: value for key, value in given.items() if value != 0}
    if ("color_jitter" in given) != ("color_jitter_prob" in given):
        raise InputError(
            "data.augment_options: color_jitter (four numbers: brightness, contrast, saturation, "
            "hue) and color_jitter_prob go together; give both or neither"
        )
    try:
        T.ColorJitter(*given.get("color_jitter", ()))
    except ValueError as error:
        raise InputError(f"data.augment_options.color_jitter: {error}") from None
    return given


def evaluation_shrink(preprocess: Preprocess) -> DraftScale:
    """The fraction of a picture's width and height that the evaluation transform needs."""
    height, width = preprocess.image_size
    fit = max if preprocess.resize_mode != "longest" else min
    return lambda w, h: fit(width / w, height / h)


def evaluation_resized(preprocess: Preprocess) -> ResizedSize | None:
    """To what width and height the evaluation transform resizes a picture before it crops it; None
    where that is never larger than what the model takes."""
    if preprocess.resize_mode != "shortest":
        return None
    height, width = preprocess.image_size

    def resized(w: int, h: int) -> tuple[int, int]:
        scale = max(width / w, height / h)
        return round(w * scale), round(h * scale)

    return resized


def training_shrink(preprocess: Preprocess, options: Mapping[str, Any]) -> DraftScale:
    """The fraction of a picture's width and height that the smallest crop of
    `training_transform` needs."""
    options = check_augment_options(options)
    smallest = options.get("scale", DEFAULT_SCALE)[0]
    narrowest, widest = options.get("ratio", DEFAULT_RATIO)
    height, width = preprocess.image_size

    def shrink(w: int, h: int) -> float:
        area = smallest * w * h
        crop = min(w, math.sqrt(area * narrowest)), min(h, math.sqrt(area / widest))
        return max(width / crop[0], height / crop[1])

    return shrink


def sample_seed(seed: int, position: int, purpose: str) -> int:
    """64 random bits for one purpose at one position of the order."""
    return name_to_int(seed, purpose, position) % 2**64


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Seed torch's CPU generator and Python's `random` with `number`; restore both afterwards."""
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.default_generator.set_state(torch_state)


def _resize_to_fit(
    size: list[int], fit: Callable, interpolation: InterpolationMode, picture: Image
) -> Image:
    """Resize, keeping the shape, so that the longest (`fit` max) or shortest (min) side fits."""
    ratio = fit(picture.height / size[0], picture.width / size[1])
    resized = [max(1, round(side / ratio)) for side in (picture.height, picture.width)]
    return F.resize(picture, resized, interpolation)


def _pad(size: list[int], fill: int, picture: Image) -> Image:
    """Fill up around the picture to at least `size`."""
    more_height = max(0, size[0] - picture.height)
    more_width = max(0, size[1] - picture.width)
    left, top = more_width // 2, more_height // 2
    return F.pad(picture, [left, top, more_width - left, more_height - top], fill=fill)


def _sometimes(probability: float, transform: Callable[[Image], Image], picture: Image) -> Image:
    # Python's generator draws whether, torch's draws how much: as in OpenCLIP.
    return transform(picture) if random.random() < probability else picture


def _to_rgb(picture: Image) -> Image:
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _to_tensor(preprocess: Preprocess, normalized: bool) -> list[Callable]:
    if not normalized:
        return [_to_rgb, T.PILToTensor()]
    # In place: a tensor that was just made has no other reader.
    return [_to_rgb, T.ToTensor(), T.Normalize(preprocess.mean, preprocess.std, inplace=True)]


def _numbers(key: str, value: Any, count: int) -> tuple[float, ...]:
    is_of_length = isinstance(value, list | tuple) and len(value) == count
    if not is_of_length or not all(map(_is_number, value)):
        raise InputError(f"{key} is {value!r}: expected {count} numbers, all finite")
    return tuple(value)


def _is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
