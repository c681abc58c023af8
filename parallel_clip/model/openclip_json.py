"""OpenCLIP's model-config JSON: which keys it has, which switches are not built here, and reading
its values with messages that name the key."""

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from parallel_clip.errors import InputError

# Switches that make another model than the one built here, with what they turn on.
# They are off when absent, null, false, 0 or "", or at the value in OFF_VALUES.
UNSUPPORTED: dict[str, dict[str, str]] = {
    "model": {
        "multimodal_cfg": "CoCa's captioning decoder",
        "nonscalar_logit_scale": "logit_scale of shape [1]",
    },
    "vision_cfg": {
        "timm_model_name": "an image tower of timm",
        "attentional_pool": "attentional pooling",
        "pos_embed_type": "fixed positions",
        "output_tokens": "token outputs",
        "block_type": "another block",
        "qk_norm": "normalised queries and keys",
        "scaled_cosine_attn": "scaled cosine attention",
        "scale_heads": "a scale for each head",
        "scale_attn_inner": "a norm inside attention",
        "scale_attn": "a norm after attention",
        "scale_fc": "a norm inside the MLP",
    },
    "text_cfg": {
        "hf_model_name": "a text tower of Hugging Face",
        "embed_cls": "a class token in the text",
        "final_ln_after_pool": "the final norm after pooling",
        "output_tokens": "token outputs",
        "proj_type": "another text projection",
        "tokenizer_mode": "another tokenizer mode",
        "block_type": "another block",
        "qk_norm": "normalised queries and keys",
        "scaled_cosine_attn": "scaled cosine attention",
        "scale_heads": "a scale for each head",
        "scale_attn_inner": "a norm inside attention",
        "scale_attn": "a norm after attention",
        "scale_fc": "a norm inside the MLP",
    },
}
OFF_VALUES = {"pos_embed_type": "learnable", "block_type": "default", "proj_type": "linear"}

# Keys that OpenCLIP reads only beside one of the switches above (or, `output_dict`, that change how
# its forward returns and not what), so that any value of theirs leaves our models as they are.
WITHOUT_EFFECT: dict[str, set[str]] = {
    "model": {"output_dict"},
    "vision_cfg": {
        "attn_pooler_queries",
        "attn_pooler_heads",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "timm_proj_bias",
        "timm_drop",
        "timm_drop_path",
    },
    "text_cfg": {"pad_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}

READ_HERE: dict[str, set[str]] = {
    "model": {
        "embed_dim",
        "vision_cfg",
        "text_cfg",
        "quick_gelu",
        "init_logit_scale",
        "init_logit_bias",
        "custom_text",
    },
    "vision_cfg": {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "ls_init_value",
        "patch_dropout",
        "no_ln_pre",
        "final_ln_after_pool",
        "pool_type",
        "act_kwargs",
        "norm_kwargs",
    },
    "text_cfg": {
        "context_length",
        "vocab_size",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "ls_init_value",
        "eos_id",
        "no_causal_mask",
        "pool_type",
        "proj_bias",
        "act_kwargs",
        "norm_kwargs",
    },
}


class Section:
    """One of the three objects of a model config ("model", "vision_cfg" or "text_cfg").

    The reading methods give a value or the default that OpenCLIP would take, and raise InputError
    where the value has the wrong type or range.
    """

    def __init__(self, values: Any, kind: str, model_name: str):
        self.kind = kind
        self.model_name = model_name
        if not isinstance(values, Mapping):
            raise self.error(f"{kind} must be a JSON object, not {values!r}")
        self.values = values

    def error(self, what: str) -> InputError:
        return InputError(f"model config {self.model_name!r}: {what}")

    def key(self, name: str) -> str:
        return name if self.kind == "model" else f"{self.kind}.{name}"

    def unsupported(self) -> list[str]:
        """The switches that are on and not built here: `key = value (what it is)`."""
        found = []
        for name, meaning in UNSUPPORTED[self.kind].items():
            value = self.values.get(name)
            if value not in (None, False, "", OFF_VALUES.get(name)):
                shown = "{...}" if isinstance(value, Mapping) else repr(value)
                found.append(f"{self.key(name)} = {shown} ({meaning})")
        if self.kind == "vision_cfg" and isinstance(self.values.get("layers"), list):
            found.append(f"vision_cfg.layers = {self.values['layers']} (a ModifiedResNet)")
        return found

    def check_keys(self) -> None:
        """Raises InputError for a key that OpenCLIP does not have, naming the nearest it has."""
        known = READ_HERE[self.kind] | set(UNSUPPORTED[self.kind]) | WITHOUT_EFFECT[self.kind]
        for name in self.values:
            if name not in known:
                near = get_close_matches(name, sorted(known), n=1, cutoff=0)
                raise self.error(f"unknown key {self.key(name)}; the nearest known is {near[0]}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            wanted = f"a whole number of at least {minimum}"
            raise self.error(f"{self.key(name)} must be {wanted}, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.error(f"{self.key(name)} must be a number, not {value!r}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name, 0.0)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.error(f"{self.key(name)} must be true or false, not {value!r}")
        return value

    def choice(self, name: str, default: str, choices: Collection[str]) -> str:
        value = self.values.get(name, default)
        if value not in choices:
            allowed = ", ".join(choices)
            raise self.error(f"{self.key(name)} = {value!r} is not supported; use one of {allowed}")
        return value

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """A size in pixels: one number for both sides, or [height, width]."""
        value = self.values.get(name, default)
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            wanted = "a whole number of pixels or [height, width]"
            raise self.error(f"{self.key(name)} must be {wanted}, not {value!r}")
        return sides[0], sides[1]

    def optional_text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{self.key(name)} must be a text, not {value!r}")
        return value or None

    def options(self, name: str, known: Collection[str] | None = None) -> dict[str, Any]:
        """A nested object of keyword arguments; {} when absent or null."""
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(f"{self.key(name)} must be a JSON object, not {value!r}")
        for option in value:
            if known is not None and option not in known:
                built = ", ".join(known)
                raise self.error(f"{self.key(name)}.{option} is not supported; use {built}")
        return dict(value)
