"""The `config.json` of a CLIPModel or SiglipModel of Hugging Face, read as OpenCLIP's model config.

What it leaves out has the value that transformers takes. What OpenCLIP's config cannot say is an
error, never a guess. The other direction: huggingface_config_writer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from parallel_clip.convert.huggingface_defaults import (
    ACTIVATIONS,
    CLIP_DEFAULTS,
    LEGACY_EOS,
    SIGLIP_DEFAULTS,
    Json,
)
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import DEFAULT_LOGIT_SCALE
from parallel_clip.model.json_section import JsonSection, SectionKeys
from parallel_clip.model.timm_trunks import TRUNKS, Trunk
from parallel_clip.model.towers.transformer import Activation

_ACTIVATION_OF = {theirs: ours for ours, names in ACTIVATIONS.items() for theirs in names}
_NEAR = (
    "parallel_clip reads CLIPModel and SiglipModel (SigLIP, and the checkpoints of SigLIP 2 at a "
    "fixed size), each with both towers"
)


def check_model_type(config: Mapping[str, Any], where: str) -> str:
    """The model_type of a `config.json`: "clip" or "siglip". `where` is for messages.

    Raises:
        InputError: it is of another model; the message says what is near.
    """
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    if not isinstance(classes, list):
        raise InputError(f"{where}: architectures must be a list of classes, not {classes!r}")
    name = classes[0] if classes else model_type
    wanted = {"clip": "CLIPModel", "siglip": "SiglipModel"}
    if not isinstance(model_type, str) or model_type not in wanted:
        of = f"a {name} (model_type {model_type!r})" if name else "no model that it names"
        hint = ""
        if model_type == "siglip2":
            hint = "; this one takes pictures of any size (NaFlex)"
        elif str(model_type).startswith(("clip_", "siglip_", "siglip2_")):
            hint = "; this is one tower alone"
        raise InputError(f"{where} is of {of}: {_NEAR}{hint}")
    if classes and wanted[model_type] not in classes:
        raise InputError(f"{where} is of a {name}: {_NEAR}; a {wanted[model_type]} is near")
    return model_type


def openclip_model(config: Mapping[str, Any], where: str) -> tuple[Json, list[str]]:
    """OpenCLIP's model config of a `config.json`, and the keys that it leaves out, which have the
    values that transformers takes. `where` is for messages.

    Raises:
        InputError: it is of another model, or says what OpenCLIP's config cannot.
    """
    is_clip = check_model_type(config, where) == "clip"
    defaults = CLIP_DEFAULTS if is_clip else SIGLIP_DEFAULTS
    filled, left_out = _with_defaults(config, defaults, where, legacy_keys=is_clip)
    top, text, vision = (
        JsonSection(values, kind, where, SectionKeys(frozenset()))
        for kind, values in (
            ("model", filled),
            ("text_config", filled["text_config"]),
            ("vision_config", filled["vision_config"]),
        )
    )
    if vision.integer("num_channels") != 3:
        raise vision.error("vision_config.num_channels must be 3: pictures have three colours")
    model = _clip_model(top, text, vision) if is_clip else _siglip_model(text, vision)
    return model, left_out


def _with_defaults(
    config: Mapping[str, Any], defaults: Json, where: str, *, legacy_keys: bool
) -> tuple[Json, list[str]]:
    """The config with all keys of the defaults, and the keys that were not given."""
    filled, left_out = dict(config), []
    for key, default in defaults.items():
        given = config.get(key)
        if isinstance(default, dict):
            given = {} if given is None else given
            if not isinstance(given, Mapping):
                raise InputError(f"{where}: {key} must be a JSON object, not {given!r}")
            legacy = config.get(f"{key}_dict") if legacy_keys else None
            if legacy is not None and not isinstance(legacy, Mapping):
                raise InputError(f"{where}: {key}_dict must be a JSON object, not {legacy!r}")
            if legacy is not None:
                # transformers lets it overrule, with what it leaves out itself at the default.
                given = {**given, **default, **legacy}
            left_out += [f"{key}.{name}" for name in default if name not in given]
            filled[key] = {**default, **given}
        elif given is None:
            left_out.append(key)
            filled[key] = default
    return filled, left_out


class _Tower(NamedTuple):
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation
    norm_eps: float

    @classmethod
    def read(cls, section: JsonSection) -> _Tower:
        width, heads = section.integer("hidden_size"), section.integer("num_attention_heads")
        if width % heads:
            raise section.error(
                f"{section.key('hidden_size')} {width} is not divisible by the "
                f"{heads} of num_attention_heads"
            )
        return cls(
            width,
            section.integer("num_hidden_layers"),
            heads,
            section.integer("intermediate_size"),
            _ACTIVATION_OF[section.choice("hidden_act", "", _ACTIVATION_OF)],
            section.number("layer_norm_eps", 0.0),
        )

    def openclip(self) -> Json:
        """Width, depth and, as far as they are not OpenCLIP's defaults, MLP, activation, epsilon;
        without the heads."""
        keys: Json = {"width": self.width, "layers": self.layers}
        if self.mlp_width != 4 * self.width:
            keys["mlp_ratio"] = _mlp_ratio(self.width, self.mlp_width)
        if self.activation == "gelu_tanh":
            keys["act_kwargs"] = {"approximate": "tanh"}
        if self.norm_eps != 1e-5:
            keys["norm_kwargs"] = {"eps": self.norm_eps}
        return keys


def _clip_model(top: JsonSection, text: JsonSection, vision: JsonSection) -> Json:
    vision_tower, text_tower = _Tower.read(vision), _Tower.read(text)
    activations = {vision_tower.activation, text_tower.activation}
    if "quick_gelu" in activations and len(activations) > 1:
        raise top.error(
            f"vision_config.hidden_act is {vision.values['hidden_act']} and text_config.hidden_act "
            f"{text.values['hidden_act']}; OpenCLIP has quick_gelu in both towers or in none"
        )
    model: Json = {"embed_dim": top.integer("projection_dim")}
    scale = top.number("logit_scale_init_value", 0.0)
    if abs(scale - DEFAULT_LOGIT_SCALE) > 1e-3:  # transformers rounds it to 2.6592
        model["init_logit_scale"] = scale
    if "quick_gelu" in activations:
        model["quick_gelu"] = True
    head_width = vision_tower.width // vision_tower.heads
    return model | {
        "vision_cfg": {
            "image_size": vision.integer("image_size"),
            "patch_size": vision.integer("patch_size"),
            **vision_tower.openclip(),
            **({} if head_width == 64 else {"head_width": head_width}),
        },
        "text_cfg": _openclip_text(text, text_tower) | _text_pool(text),
    }


def _siglip_model(text: JsonSection, vision: JsonSection) -> Json:
    vision_tower, text_tower = _Tower.read(vision), _Tower.read(text)
    if not vision.flag("vision_use_head"):
        raise vision.error("vision_config.vision_use_head must be true: else there is no feature")
    embed_dim = vision_tower.width
    if (text.values.get("projection_size") or text_tower.width) != embed_dim:
        raise text.error(
            f"text_config.projection_size {text.values.get('projection_size')} must be "
            f"vision_config.hidden_size {embed_dim}: the features of both towers are of one width"
        )
    if vision_tower.activation == "quick_gelu":
        raise vision.error("vision_config.hidden_act quick_gelu is not built here in a SiglipModel")
    return {
        "embed_dim": embed_dim,
        "init_logit_scale": math.log(10),
        "init_logit_bias": -10.0,
        "custom_text": True,
        **({"quick_gelu": True} if text_tower.activation == "quick_gelu" else {}),
        "vision_cfg": _timm_vision(
            vision_tower, vision.integer("image_size"), vision.integer("patch_size")
        ),
        "text_cfg": _openclip_text(text, text_tower)
        | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }


def _openclip_text(section: JsonSection, tower: _Tower) -> Json:
    return {
        "context_length": section.integer("max_position_embeddings"),
        "vocab_size": section.integer("vocab_size"),
        "heads": tower.heads,
        **tower.openclip(),
    }


def _text_pool(section: JsonSection) -> Json:
    eos = section.values["eos_token_id"]
    if type(eos) is not int or eos < 0:
        raise section.error(f"text_config.eos_token_id must be the number of a token, not {eos!r}")
    return {} if eos == LEGACY_EOS else {"pool_type": "eos", "eos_id": eos}


def _timm_vision(tower: _Tower, image_size: int, patch_size: int) -> Json:
    """The trunk of timm that is most like the tower, and the keys in which it differs."""

    def changes(name: str) -> Json:
        return _changed_keys(TRUNKS[name], tower, patch_size)

    names = [name for name in TRUNKS if "siglip" in name]
    name = min(names, key=lambda name: (len(changes(name)), not name.endswith(f"_{image_size}")))
    return {
        "image_size": image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        **changes(name),
    }


def _changed_keys(trunk: Trunk, tower: _Tower, patch_size: int) -> Json:
    size, keys = trunk.size, {}
    if size.width != tower.width:
        keys["width"] = tower.width
    if size.layers != tower.layers:
        keys["layers"] = tower.layers
    if size.width // size.heads != tower.width // tower.heads:
        keys["head_width"] = tower.width // tower.heads
    if int(tower.width * size.mlp_ratio) != tower.mlp_width:
        keys["mlp_ratio"] = _mlp_ratio(tower.width, tower.mlp_width)
    if trunk.patch_size != patch_size:
        keys["patch_size"] = patch_size
    if trunk.activation != tower.activation:
        tanh = tower.activation == "gelu_tanh"
        keys["act_kwargs"] = {"approximate": "tanh" if tanh else "none"}
    if trunk.norm_eps != tower.norm_eps:
        keys["norm_kwargs"] = {"eps": tower.norm_eps}
    return keys


def _mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio of which OpenCLIP's int(width * ratio) makes `mlp_width`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
