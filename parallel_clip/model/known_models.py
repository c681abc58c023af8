"""The models that are known by name: 77 configs of OpenCLIP 3.3.0.

Here are the 45 that are a plain vision transformer with OpenCLIP's own text transformer; the others
are in known_timm_models.py. Facts only, in three steps: sizes, variants, models. `model_config`
puts them together in OpenCLIP's JSON form, key for key what OpenCLIP has in its file of that name.
"""

import math
import os.path
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object
from parallel_clip.model.architecture import Architecture
from parallel_clip.model.known_timm_models import TIMM_MODELS, timm_model_config
from parallel_clip.model.openclip_json import MODEL_KEYS, architecture_from_json


def known_names() -> list[str]:
    """The models known by name, small to large within a family."""
    return [*MODELS, *TIMM_MODELS]


class NamedModel(NamedTuple):
    """A model, and OpenCLIP's preprocess_cfg where the file that describes it has one, or where all
    weights that OpenCLIP has of the name have one and the same."""

    architecture: Architecture
    preprocess: dict[str, Any] | None


def load_model(name_or_path: str, loss: str = "infonce") -> NamedModel:
    """A model by its OpenCLIP name, or from a JSON file in OpenCLIP's model-config format; with
    the logit parameters that `loss` ("infonce" or "sigmoid") needs.

    The file may also be an `open_clip_config.json`, which has the model config under "model_cfg"
    and the preprocessing under "preprocess_cfg".
    Raises InputError for an unknown name, a file that cannot be read, or a model not built here.
    """
    name = name_or_path.replace("/", "-")
    path = Path(name_or_path)
    preprocess = None
    if name in known_names():
        config, preprocess = model_config(name), _preprocess_of(name)
    elif path.suffix == ".json" or os.path.isfile(path):
        name, config, preprocess = _read_file(path)
    else:
        raise _unknown(name, name_or_path)
    return NamedModel(architecture_from_json(with_logit_defaults(config, loss), name), preprocess)


def load_architecture(name_or_path: str, loss: str = "infonce") -> Architecture:
    """The architecture of `load_model`."""
    return load_model(name_or_path, loss).architecture


def known_name(architecture: Architecture, loss: str = "infonce") -> str | None:
    """The name by which `load_model` knows an architecture, None where it does not: its own name
    before others of the same architecture."""
    names = known_names()
    for name in (architecture.name, *names):
        if name in names and load_architecture(name, loss) == architecture:
            return name
    return None


def with_logit_defaults(config: Any, loss: str) -> Any:
    """A model config as a loss needs it: with "sigmoid" the model has a bias, and starts at scale
    ln 10 and bias -10 (Zhai et al., arXiv 2303.15343) where its JSON does not say otherwise.
    Checkpoints keep this JSON, with the defaults first."""
    if loss != "sigmoid" or not isinstance(config, dict):
        return config  # what is no object is refused where it is read
    defaults = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    nullable = defaults.keys() | MODEL_KEYS.unsupported.keys() | MODEL_KEYS.without_effect
    given = {k: v for k, v in config.items() if v is not None or k not in nullable}
    return defaults | given


# OpenCLIP's preprocess_cfg by what a model's name has in it; the first that fits. Each is that of
# all weights that OpenCLIP has of these names; other names have weights of several kinds, or those
# of OpenAI's, which are the default.
_HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
_PREPROCESS: dict[str, dict[str, Any]] = {
    "SigLIP": _HALVES | {"interpolation": "bicubic"},
    "PE-Core": _HALVES | {"interpolation": "bilinear"},
    "CLIPA": {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
    "-378": {"resize_mode": "squash"},
}

# What OpenCLIP has and is not built here, by the beginning of its name, with what is near.
_NOT_BUILT = {
    "coca": ("a CoCa model, with a captioning decoder", "ViT-L-14"),
    "eva": ("an EVA model", "PE-Core-L-14-336"),
    "mobileclip-b": ("a model with an image tower of a convolutional stem and a ViT", "ViT-B-16"),
    "mobileclip2-b": ("a model with an image tower of a convolutional stem and a ViT", "ViT-B-16"),
    "mobileclip": ("a model with a FastViT image tower", "MobileCLIP2-L-14"),
    "vitamin": ("a ViTamin model", "ViT-L-14"),
    "rn": ("a ResNet", "ViT-B-32"),
    "convnext": ("a ConvNeXt", "ViT-B-32"),
    "swin": ("a Swin transformer", "ViT-B-16"),
    "htsat": ("an audio model", "ViT-B-32"),
    "whisper": ("an audio model", "ViT-B-32"),
    "clap": ("an audio model", "ViT-B-32"),
    "nllb": ("a model with a text tower of Hugging Face", "ViT-B-16-SigLIP-i18n-256"),
    "roberta": ("a model with a text tower of Hugging Face", "ViT-B-32"),
    "xlm-roberta": ("a model with a text tower of Hugging Face", "ViT-H-14-worldwide"),
    "mt5": ("a model with a text tower of Hugging Face", "ViT-L-14-worldwide"),
}


def _preprocess_of(name: str) -> dict[str, Any] | None:
    return next((deepcopy(cfg) for part, cfg in _PREPROCESS.items() if part in name), None)


def _unknown(name: str, given: str) -> InputError:
    lower = name.lower()
    if "naflex" in lower:
        what, near = "a NaFlex model, of any picture size", "ViT-B-16-SigLIP2-256"
    else:
        found = (_NOT_BUILT[begin] for begin in _NOT_BUILT if lower.startswith(begin))
        what, near = next(found, (None, None))
    if what is not None:
        return InputError(
            f"model.name {given!r} is {what}, which is not built here; near is {near}"
        )
    lower_names = {known.lower(): known for known in known_names()}
    nearest = get_close_matches(lower, lower_names, 3, cutoff=0.0)
    return InputError(
        f"model.name {given!r} is neither one of the {len(lower_names)} known models "
        f"(nearest: {', '.join(lower_names[near] for near in nearest)}) nor a JSON file in "
        "OpenCLIP's model-config format"
    )


def _read_file(path: Path) -> tuple[str, Any, dict[str, Any] | None]:
    """A model's name, its config, which under "model_cfg" may still be anything, and its
    preprocessing."""
    config = read_json_object(path)
    preprocess = None
    if "model_cfg" in config:
        config, preprocess = config["model_cfg"], config.get("preprocess_cfg")
        if preprocess is not None and not isinstance(preprocess, dict):
            raise InputError(f"{path}: preprocess_cfg must be a JSON object, not {preprocess!r}")
    # Every OpenCLIP checkpoint's file has the same name; its folder's name says which model it is.
    name = path.resolve().parent.name if path.stem == "open_clip_config" else path.stem
    return name, config, preprocess


class Size(NamedTuple):
    """Widths and depths of both towers. Text heads are always 64 wide, and `embed_dim` is always
    the width of the text tower."""

    width: int
    layers: int
    text_width: int
    text_layers: int
    head_width: int = 64
    mlp_ratio: float = 4.0


class Variant(NamedTuple):
    """What a variant adds to the three objects of the JSON."""

    model: dict[str, Any] = {}
    vision: dict[str, Any] = {}
    text: dict[str, Any] = {}


SIZES = {
    "S": Size(384, 12, 384, 12),
    "S-alt": Size(384, 12, 256, 10),
    "M": Size(512, 12, 512, 12),
    "M-alt": Size(512, 12, 384, 12),
    "B": Size(768, 12, 512, 12),
    "B-plus": Size(896, 12, 640, 12),
    "L": Size(1024, 24, 768, 12),
    "H": Size(1280, 32, 1024, 24, head_width=80),
    "g": Size(1408, 40, 1024, 24, head_width=88, mlp_ratio=4.3637),
    "bigG": Size(1664, 48, 1280, 32, head_width=104, mlp_ratio=4.9231),
    "e": Size(1792, 56, 1280, 36, head_width=112, mlp_ratio=8.5715),
}

VARIANTS = {
    "quickgelu": Variant(model={"quick_gelu": True}),
    "layer-scale": Variant(vision={"ls_init_value": 1e-4}),
    "CLIPA": Variant(
        vision={"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        text={
            "context_length": 32,
            "vocab_size": 32000,
            "hf_tokenizer_name": "bert-base-uncased",
            "tokenizer_kwargs": {"strip_sep_token": True},
            "pool_type": "last",
            "no_causal_mask": True,
        },
    ),
    "mt5": Variant(
        text={
            "vocab_size": 250100,
            "hf_tokenizer_name": "google/mt5-base",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "pool_type": "eos",
            "eos_id": 1,
        }
    ),
    "xlm-v": Variant(
        text={
            "vocab_size": 901629,
            "hf_tokenizer_name": "facebook/xlm-v-base",
            "pool_type": "eos",
            "eos_id": 2,
        }
    ),
}

#   name                              size      patch  image  variants
MODELS = {
    "ViT-S-32":                     ("S",         32,   224),
    "ViT-S-32-alt":                 ("S-alt",     32,   224),
    "ViT-S-16":                     ("S",         16,   224),
    "ViT-S-16-alt":                 ("S-alt",     16,   224),
    "ViT-M-32":                     ("M",         32,   224),
    "ViT-M-32-alt":                 ("M-alt",     32,   224),
    "ViT-M-16":                     ("M",         16,   224),
    "ViT-M-16-alt":                 ("M-alt",     16,   224,  "layer-scale"),
    "ViT-B-32":                     ("B",         32,   224),
    "ViT-B-32-256":                 ("B",         32,   256),
    "ViT-B-32-quickgelu":           ("B",         32,   224,  "quickgelu"),
    "ViT-B-32-plus-256":            ("B-plus",    32,   256),
    "ViT-B-16":                     ("B",         16,   224),
    "ViT-B-16-quickgelu":           ("B",         16,   224,  "quickgelu"),
    "ViT-B-16-plus":                ("B-plus",    16,   224),
    "ViT-B-16-plus-240":            ("B-plus",    16,   240),
    "ViT-L-16":                     ("L",         16,   224),
    "ViT-L-16-320":                 ("L",         16,   320),
    "ViT-L-14":                     ("L",         14,   224),
    "ViT-L-14-280":                 ("L",         14,   280),
    "ViT-L-14-336":                 ("L",         14,   336),
    "ViT-L-14-quickgelu":           ("L",         14,   224,  "quickgelu"),
    "ViT-L-14-336-quickgelu":       ("L",         14,   336,  "quickgelu"),
    "ViT-L-14-CLIPA":               ("L",         14,   224,  "CLIPA"),
    "ViT-L-14-CLIPA-336":           ("L",         14,   336,  "CLIPA"),
    "ViT-L-14-worldwide":           ("L",         14,   224,  "mt5"),
    "ViT-L-14-worldwide-quickgelu": ("L",         14,   224,  "mt5", "quickgelu"),
    "ViT-H-16":                     ("H",         16,   224),
    "ViT-H-14":                     ("H",         14,   224),
    "ViT-H-14-378":                 ("H",         14,   378),
    "ViT-H-14-quickgelu":           ("H",         14,   224,  "quickgelu"),
    "ViT-H-14-378-quickgelu":       ("H",         14,   378,  "quickgelu"),
    "ViT-H-14-CLIPA":               ("H",         14,   224,  "CLIPA"),
    "ViT-H-14-CLIPA-336":           ("H",         14,   336,  "CLIPA"),
    "ViT-H-14-worldwide":           ("H",         14,   224,  "xlm-v"),
    "ViT-H-14-worldwide-378":       ("H",         14,   378,  "xlm-v"),
    "ViT-H-14-worldwide-quickgelu": ("H",         14,   224,  "xlm-v", "quickgelu"),
    "ViT-g-14":                     ("g",         14,   224),
    "ViT-bigG-14":                  ("bigG",      14,   224),
    "ViT-bigG-14-quickgelu":        ("bigG",      14,   224,  "quickgelu"),
    "ViT-bigG-14-CLIPA":            ("bigG",      14,   224,  "CLIPA"),
    "ViT-bigG-14-CLIPA-336":        ("bigG",      14,   336,  "CLIPA"),
    "ViT-bigG-14-worldwide":        ("bigG",      14,   224,  "xlm-v"),
    "ViT-bigG-14-worldwide-378":    ("bigG",      14,   378,  "xlm-v"),
    "ViT-e-14":                     ("e",         14,   224),
}  # fmt: skip


def model_config(name: str) -> dict[str, Any]:
    """The model called `name`, a known one, as OpenCLIP's JSON has it; a new dict each time."""
    if name not in MODELS:
        return timm_model_config(name)
    size_name, patch_size, image_size, *variant_names = MODELS[name]
    size = SIZES[size_name]
    config: dict[str, Any] = {
        "embed_dim": size.text_width,
        "vision_cfg": {
            "image_size": image_size,
            "layers": size.layers,
            "width": size.width,
            "patch_size": patch_size,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": size.text_width,
            "heads": size.text_width // 64,
            "layers": size.text_layers,
        },
    }
    for key in ("head_width", "mlp_ratio"):
        if getattr(size, key) != Size._field_defaults[key]:
            config["vision_cfg"][key] = getattr(size, key)
    for variant_name in variant_names:
        variant = VARIANTS[variant_name]
        config.update(variant.model)
        config["vision_cfg"].update(variant.vision)
        config["text_cfg"].update(variant.text)
    return deepcopy(config)
