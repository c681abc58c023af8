"""The keys of a config model as users write them: their names, types, defaults and errors.

The phrase that says what a key takes is the same in an error message and in the documentation.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NOUNS = {bool: "true or false", int: "integer", float: "number", str: "text"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of `model` in order: its dotted path and its field.

    A section that is always there gives way to its keys; one that may be null, and a list of
    sections, come first and are followed by theirs (those of a list under the number 0).
    """
    for name, field in fields_of(model).items():
        path = prefix + name
        section, is_list = section_of(field.annotation)
        if not isinstance(field.default, BaseModel):
            yield path, field
        if section is not None:
            yield from keys_of(section, f"{path}.0." if is_list else f"{path}.")


def describe_type(field: FieldInfo) -> str:
    """What the field accepts, in words: 'integer ≥ 1 or null'."""
    return _phrase(field.annotation, _bounds(field.metadata))


def show(value: Any) -> str:
    """`value` as it would stand in a config file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the names that users write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model inside `Model`, `Model | None` or `list[Model]`, and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, list):
        for member in get_args(annotation):
            section, is_list = section_of(member)
            if section is not None:
                return section, is_list or origin is list
    return None, False


def _bounds(metadata: list[Any]) -> str:
    return " and ".join(
        f"{sign} {getattr(constraint, name):g}"
        for constraint in metadata
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    )


def _phrase(annotation: Any, bounds: str = "") -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if members[1].title:  # what its pattern is called
            return members[1].title
        return _phrase(members[0], _bounds(members[1].metadata))
    if origin in (Union, types.UnionType):
        return " or ".join(_phrase(member, bounds) for member in members)
    if origin is Literal:
        return "one of " + ", ".join(members) if len(members) > 1 else members[0]
    if origin is tuple:
        return f"list of {len(members)}, each {_phrase(members[0])}"
    if origin is list:
        return f"list, each {_phrase(members[0])}"
    if origin is dict:
        known = get_args(members[0])
        of = f"mapping with {', '.join(known)}" if known else "mapping"
        return of if members[1] is Any else f"{of}, each {_phrase(members[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping with {', '.join(fields_of(annotation))}"
    return f"{_NOUNS[annotation]} {bounds}".rstrip()
