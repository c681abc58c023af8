"""Reading one object of a model config, with error messages that name the key."""

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from parallel_clip.errors import InputError


@dataclass(frozen=True)
class SectionKeys:
    """Which keys a section may have.

    read: those that have an effect here; unsupported: switches that make another model than the
    ones built here, with what each turns on, off when absent, null, false, 0 or "", or at its value
    in `off_values`; without_effect: those that OpenCLIP reads only beside such a switch.
    """

    read: frozenset[str]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    off_values: Mapping[str, str] = field(default_factory=dict)


class JsonSection:
    """One of the three objects of a model config ("model", "vision_cfg" or "text_cfg").

    The reading methods give a value or the default that OpenCLIP would take, and raise InputError
    where the value has the wrong type or range.
    """

    def __init__(self, values: Any, kind: str, model_name: str, keys: SectionKeys):
        self.kind = kind
        self.keys = keys
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
        for name, meaning in self.keys.unsupported.items():
            value = self.values.get(name)
            if value not in (None, False, "", self.keys.off_values.get(name)):
                shown = "{...}" if isinstance(value, Mapping) else repr(value)
                found.append(f"{self.key(name)} = {shown} ({meaning})")
        return found

    def check_keys(self) -> None:
        """Raises InputError for a key that OpenCLIP does not have, naming the nearest it has."""
        keys = self.keys
        known = sorted(keys.read | keys.without_effect | set(keys.unsupported))
        for name in self.values:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0)
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
        if not is_number or not abs(value) <= sys.float_info.max:
            raise self.error(f"{self.key(name)} must be a number, not {value!r}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name, 0.0)

    def fraction(self, name: str) -> float:
        value = 0.0 if self.values.get(name) is None else self.number(name, 0.0)
        if not 0 <= value < 1:
            raise self.error(f"{self.key(name)} {value} must be at least 0 and below 1")
        return value

    def mlp_width(self, width: int, default_ratio: float = 4.0) -> int:
        """Channels of the MLPs of a tower of so many, by OpenCLIP's and timm's rounding."""
        ratio = self.number("mlp_ratio", default_ratio)
        if not 1 <= width * ratio < math.inf:
            raise self.error(f"{self.key('mlp_ratio')} {ratio} leaves no MLP at width {width}")
        return int(width * ratio)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is None:  # OpenCLIP asks only whether it is true
            return False
        if not isinstance(value, bool):
            raise self.error(f"{self.key(name)} must be true or false, not {value!r}")
        return value

    def choice(self, name: str, default: str, choices: Collection[str]) -> str:
        value = self.values.get(name, default)
        if not isinstance(value, str) or value not in choices:
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

    def gelu(self, name: str, default: str = "gelu") -> Literal["gelu", "gelu_tanh"]:
        """Which GELU its options ask for."""
        options = self.options(name, known=("approximate",))
        approximate = options.get("approximate")
        if approximate not in (None, "none", "tanh"):
            raise self.error(
                f"{self.key(name)}.approximate must be 'none' or 'tanh', not {approximate!r}"
            )
        return {"tanh": "gelu_tanh", "none": "gelu", None: default}[approximate]

    def norm_eps(self, name: str, default: float = 1e-5) -> float:
        eps = self.options(name, known=("eps",)).get("eps", default)
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise self.error(f"{self.key(name)}.eps must be a number between 0 and 1, not {eps!r}")
        return float(eps)

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
