"""The keys of a config model as users write them: their names, types, defaults and errors.

The phrase that says what a key takes is the same in an error message and in the documentation.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_NOUNS = {bool: "true or false", int: "integer", float: "number", str: "text"}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


@dataclass(frozen=True)
class Key:
    """One key as the documentation shows it; a required key has no default."""

    path: str
    takes: str
    required: bool
    default: Any
    doc: str


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key of `model` in order.

    A section that is always there gives way to its keys; one that may be null, and a list of
    sections, come first and are followed by theirs (those of a list under the number 0).
    """
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        section, is_list = _section_of(field.annotation)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):
            yield Key(path, takes(field), field.is_required(), default, field.description or "")
        if section is not None:
            yield from keys_of(section, f"{path}.0." if is_list else f"{path}.")


def takes(field: FieldInfo) -> str:
    """What the field accepts, in words: 'integer ≥ 1 or null'."""
    return _phrase(field.annotation, _bounds(field.metadata))


def nearest_key(path: str, model: type[BaseModel]) -> str:
    """The known key or section most like `path`; a known name in the wrong section is found."""
    leaf = path.rpartition(".")[2]
    keys = [key.path for key in keys_of(model)]
    sections = [key.partition(".")[0] for key in keys if "." in key]

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, path, known).ratio()
        last = difflib.SequenceMatcher(None, leaf, known.rpartition(".")[2]).ratio()
        return whole + last

    return max(dict.fromkeys(keys + sections), key=likeness)


def problems_in(error: ValidationError, model: type[BaseModel], tree: Any) -> list[str]:
    """Pydantic's errors about `tree`, one plain sentence a key, in the order of the keys."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, field, value = _locate(detail["loc"], model, tree)
        if field is None:
            problem = f"unknown key {path}; did you mean {nearest_key(path, model)}?"
        elif detail["type"] == "missing":
            problem = f"{path} is missing; expected {takes(field)}"
        else:
            problem = f"{path} is {show(value)}; expected {takes(field)}"
        problems.setdefault(path, problem)  # each member of a union reports by itself
    return list(problems.values())


def show(value: Any) -> str:
    """`value` as it would stand in a config file, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(
    location: tuple[int | str, ...], model: type[BaseModel], tree: Any
) -> tuple[str, FieldInfo | None, Any]:
    """The key that an error is about: its dotted path, its field (None: unknown), its value."""
    section: type[BaseModel] | None = model
    field, path, trail = None, "", []
    value, below = None, tree
    for step in location:
        if section is None:  # inside a leaf: a place in a list, or which member of a union failed
            break
        trail.append(str(step))
        if isinstance(step, int) and isinstance(below, list):
            below = below[step]
            continue
        field = _field_named(step, section)
        path = ".".join(trail)
        if field is None:
            return path, None, None
        value = below = below.get(step)
        section, _ = _section_of(field.annotation)
    return path, field, value


def _field_named(name: int | str, model: type[BaseModel]) -> FieldInfo | None:
    for own_name, field in model.model_fields.items():
        if name == (field.alias or own_name):
            return field
    return None


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model inside `Model`, `Model | None` or `list[Model]`, and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, list):
        for member in get_args(annotation):
            section, is_list = _section_of(member)
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
        return "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        names = (field.alias or name for name, field in annotation.model_fields.items())
        return f"mapping with {', '.join(names)}"
    return f"{_NOUNS[annotation]} {bounds}".rstrip()
