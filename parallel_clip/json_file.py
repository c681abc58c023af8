"""Reading a JSON object that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel_clip.errors import InputError

# Objects and lists in one another. No config or tokenizer has a tenth of it; copying, printing and
# writing what is deeper would recurse too far.
_DEEPEST = 100


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        InputError: the file cannot be read, or what is in it, as in `parse_json_object`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    return parse_json_object(content, str(file))


def parse_json_object(content: bytes, name: str) -> dict[str, Any]:
    """The object in `content`; `name` of the file is for messages.

    Raises:
        InputError: it is no JSON in UTF-8, is something else than an object, or is nested more than
            100 deep.
    """
    try:
        values = json.loads(content.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        if _is_deeper(values, _DEEPEST):
            raise RecursionError
    except ValueError as error:
        raise InputError(f"{name} cannot be read as JSON: {error}") from None
    except RecursionError:
        raise InputError(
            f"{name} cannot be read as JSON: it is nested more than {_DEEPEST} deep"
        ) from None
    return values


def _is_deeper(values: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [values]
    for _ in range(depth):
        inner = (v for held in level for v in (held.values() if isinstance(held, dict) else held))
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)
