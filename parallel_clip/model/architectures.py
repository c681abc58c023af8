"""What a CLIP model is: widths, depths, switches. Read from OpenCLIP's JSON or known by name."""

import json
import math
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from parallel_clip.errors import InputError
from parallel_clip.model.architecture_table import MODELS, model_config
from parallel_clip.model.openclip_json import Section

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class VisionArchitecture:
    """The image tower: patches and a class token through pre-norm transformer blocks.

    Sizes in pixels are (height, width). `layer_scale` is the initial value of the scale on each
    residual branch (None: there is none); `pre_norm` a LayerNorm before the first block.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    pool: Literal["tok", "avg"]
    final_norm_after_pool: bool
    pre_norm: bool
    layer_scale: float | None
    patch_dropout: float
    activation: Activation
    norm_eps: float

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; pixels that do not fill a patch are left out."""
        (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
        return height // patch_height, width // patch_width

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patches_kept(self) -> int:
        """Patches of a picture that pass through the blocks in training, by OpenCLIP's rounding."""
        return max(1, int(self.patches * (1 - self.patch_dropout)))

    @property
    def tokens(self) -> int:
        """Sequence length without patch dropout: the patches and the class token."""
        return self.patches + 1


@dataclass(frozen=True)
class TextArchitecture:
    """The text tower. `eos_id` matters for pool "eos" alone; `tokenizer` is the name of a Hugging
    Face tokenizer, or None for OpenCLIP's own."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    context_length: int
    vocab_size: int
    pool: Literal["argmax", "last", "eos", "first"]
    causal: bool
    eos_id: int
    projection_bias: bool
    layer_scale: float | None
    activation: Activation
    norm_eps: float
    tokenizer: str | None
    tokenizer_kwargs: dict[str, Any] = field(hash=False)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Architecture:
    """Both towers and what joins them.

    Two architectures are equal when they are the same model, whatever they are called.
    `init_logit_scale` and `init_logit_bias` are None where the JSON does not say. `custom_text`
    chooses OpenCLIP's names of parameters: with it those of the text tower begin with "text.".
    `json` is the model config as it was given, in OpenCLIP's own keys.
    """

    name: str = field(compare=False)
    embed_dim: int
    vision: VisionArchitecture
    text: TextArchitecture
    init_logit_scale: float | None
    init_logit_bias: float | None
    custom_text: bool
    json: dict[str, Any] = field(compare=False, repr=False)


def known_names() -> list[str]:
    """The models known by name, small to large."""
    return list(MODELS)


def load_architecture(name_or_path: str) -> Architecture:
    """A model by its OpenCLIP name, or from a JSON file in OpenCLIP's model-config format.

    The file may also be an `open_clip_config.json`, which has the model config under "model_cfg".
    Raises InputError for an unknown name, a file that cannot be read, or a model not built here.
    """
    name = name_or_path.replace("/", "-")
    if name in MODELS:
        return architecture_from_json(model_config(name), name)
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        return _read_file(path)
    lower_names = {known.lower(): known for known in MODELS}
    nearest = [lower_names[n] for n in get_close_matches(name.lower(), lower_names, 3, cutoff=0.0)]
    raise InputError(
        f"model.name {name_or_path!r} is neither one of the {len(MODELS)} known models (nearest: "
        f"{', '.join(nearest)}) nor a JSON file in OpenCLIP's model-config format"
    )


def for_loss(architecture: Architecture, kind: str) -> Architecture:
    """The model as a loss needs it: with "sigmoid" it has a bias, and starts at scale ln 10 and
    bias -10 (Zhai et al., arXiv 2303.15343) where its JSON does not say otherwise."""
    if kind != "sigmoid":
        return architecture
    defaults = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    given = {key: value for key, value in architecture.json.items() if value is not None}
    return architecture_from_json({**defaults, **given}, architecture.name)


def _read_file(path: Path) -> Architecture:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model config {str(path)!r} cannot be read as JSON: {error}") from error
    if isinstance(config, dict) and "model_cfg" in config:
        config = config["model_cfg"]
    # Every OpenCLIP checkpoint's file has the same name; its folder's name says which model it is.
    name = path.resolve().parent.name if path.stem == "open_clip_config" else path.stem
    return architecture_from_json(config, name)


def architecture_from_json(cfg: dict[str, Any], name: str) -> Architecture:
    """The model that OpenCLIP would build from `cfg`; `name` is for messages and records.

    Raises InputError for a switch that is not built here, an unknown key, a value of the wrong
    type, and for sizes that do not fit each other.
    """
    model = Section(cfg, "model", name)
    for key in ("vision_cfg", "text_cfg"):
        if key not in model.values:
            raise model.error(f"{key} is missing")
    vision = Section(cfg["vision_cfg"], "vision_cfg", name)
    text = Section(cfg["text_cfg"], "text_cfg", name)

    unsupported = [switch for s in (model, vision, text) for switch in s.unsupported()]
    if unsupported:
        raise model.error(
            f"not supported: {'; '.join(unsupported)}; parallel_clip trains plain vision "
            "transformers with OpenCLIP's own text transformer, such as ViT-B-32"
        )
    for section in (model, vision, text):
        section.check_keys()

    quick_gelu = model.flag("quick_gelu")
    return Architecture(
        name=name,
        embed_dim=model.integer("embed_dim"),
        vision=_read_vision(vision, quick_gelu),
        text=_read_text(text, quick_gelu),
        init_logit_scale=model.optional_number("init_logit_scale"),
        init_logit_bias=model.optional_number("init_logit_bias"),
        # OpenCLIP goes by the presence of hf_model_name, even when it is null.
        custom_text=model.flag("custom_text") or "hf_model_name" in text.values,
        json=deepcopy(cfg),
    )


def _read_vision(section: Section, quick_gelu: bool) -> VisionArchitecture:
    width = section.integer("width", 768)
    head_width = section.integer("head_width", 64)
    heads = width // head_width
    if heads == 0 or width % heads:
        raise section.error(
            f"vision_cfg.width {width} cannot be cut into heads of vision_cfg.head_width "
            f"{head_width}; choose a multiple of {head_width}"
        )
    vision = VisionArchitecture(
        width=width,
        layers=section.integer("layers", 12),
        heads=heads,
        mlp_width=_mlp_width(section, width),
        image_size=section.pair("image_size", 224),
        patch_size=section.pair("patch_size", 16),
        pool=section.choice("pool_type", "tok", ("tok", "avg")),
        final_norm_after_pool=section.flag("final_ln_after_pool"),
        pre_norm=not section.flag("no_ln_pre"),
        layer_scale=section.optional_number("ls_init_value"),
        patch_dropout=section.number("patch_dropout", 0.0),
        activation=_activation(section, quick_gelu),
        norm_eps=_norm_eps(section),
    )
    if not 0 <= vision.patch_dropout < 1:
        raise section.error(
            f"vision_cfg.patch_dropout {vision.patch_dropout} must be at least 0 and below 1"
        )
    if vision.patches == 0:
        raise section.error(
            f"vision_cfg.patch_size {vision.patch_size} is larger than vision_cfg.image_size "
            f"{vision.image_size}: a picture has no whole patch"
        )
    return vision


def _read_text(section: Section, quick_gelu: bool) -> TextArchitecture:
    width = section.integer("width", 512)
    heads = section.integer("heads", 8)
    if width % heads:
        raise section.error(
            f"text_cfg.width {width} is not divisible by text_cfg.heads {heads}; the nearest "
            f"width below that is {width // heads * heads}"
        )
    text = TextArchitecture(
        width=width,
        layers=section.integer("layers", 12),
        heads=heads,
        mlp_width=_mlp_width(section, width),
        context_length=section.integer("context_length", 77),
        vocab_size=section.integer("vocab_size", 49408),
        pool=section.choice("pool_type", "argmax", ("argmax", "last", "eos", "first")),
        causal=not section.flag("no_causal_mask"),
        eos_id=section.integer("eos_id", 2, minimum=0),
        projection_bias=section.flag("proj_bias"),
        layer_scale=section.optional_number("ls_init_value"),
        activation=_activation(section, quick_gelu),
        norm_eps=_norm_eps(section),
        tokenizer=section.optional_text("hf_tokenizer_name"),
        tokenizer_kwargs=section.options("tokenizer_kwargs"),
    )
    if text.pool == "eos" and text.eos_id >= text.vocab_size:
        raise section.error(
            f"text_cfg.eos_id {text.eos_id} lies outside text_cfg.vocab_size {text.vocab_size}"
        )
    return text


def _mlp_width(section: Section, width: int) -> int:
    ratio = section.number("mlp_ratio", 4.0)
    mlp_width = int(width * ratio)
    if mlp_width < 1:
        raise section.error(f"{section.key('mlp_ratio')} {ratio} leaves no MLP at width {width}")
    return mlp_width


def _activation(section: Section, quick_gelu: bool) -> Activation:
    options = section.options("act_kwargs", known=("approximate",))
    if quick_gelu:
        if options:
            raise section.error(
                f"{section.key('act_kwargs')} {options} belongs to GELU and quick_gelu is on; "
                "remove one of them"
            )
        return "quick_gelu"
    approximate = options.get("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise section.error(
            f"{section.key('act_kwargs')}.approximate must be 'none' or 'tanh', not {approximate!r}"
        )
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _norm_eps(section: Section) -> float:
    options = section.options("norm_kwargs", known=("eps",))
    eps = options.get("eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise section.error(
            f"{section.key('norm_kwargs')}.eps must be a number between 0 and 1, not {eps!r}"
        )
    return float(eps)
