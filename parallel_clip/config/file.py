"""Config text: YAML in and out, and `key=value` overrides laid over it.

Nothing here knows which keys exist; that is `config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from parallel_clip.errors import InputError

# PyYAML follows YAML 1.1, where a number in exponent form needs a dot and a sign: 5e-4 is text.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader; reads 5e-4 as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper; quotes whatever text the loader above would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_yaml(text: str, origin: str) -> Any:
    """Parse `text`; `origin` names where it came from in the error message.

    Raises:
        InputError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{origin}{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{origin}: not valid YAML: {error}") from None


def write_yaml(tree: dict[str, Any]) -> str:
    """`tree` as YAML that `read_yaml` gives back unchanged; keys in their own order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's keys with the overrides laid over them, not yet checked.

    Raises:
        InputError: the file cannot be read, is not a mapping, or an override cannot be placed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the config file {path}: {reason}") from None
    tree = read_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a config is a mapping of keys such as 'seed: 0'")
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Lay one `dotted.key=value` over `tree`, in place; the value is read as YAML.

    A number in the key is a place in a list; the place after the last one adds an entry.

    Raises:
        InputError: no '=', a value that is not YAML, or a key that leads through a plain value.
    """
    key, equals, text = override.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise InputError(f"override {override!r}: write it as key=value, e.g. optimizer.lr=1e-3")
    try:
        value = read_yaml(text, f"override {key}")
    except InputError as error:
        raise InputError(
            f"{error}; put text that begins with or holds special characters in double quotes, "
            f"""e.g. '{key}="{text}"'"""
        ) from None

    node: Any = tree
    for depth, step in enumerate(steps[:-1]):
        path = ".".join(steps[: depth + 1])
        place = _place(node, step, override, path)
        child = node[place]
        if child is None:
            child = node[place] = [] if steps[depth + 1].isdigit() else {}
        if not isinstance(child, (dict, list)):
            raise InputError(f"override {override!r}: {path} is {child!r}, with no keys below it")
        node = child
    node[_place(node, steps[-1], override, key.strip())] = value


def _place(node: dict | list, step: str, override: str, path: str) -> str | int:
    """`step` as a key of `node`, or as a place in it where `node` is a list; None is put there
    where nothing is yet."""
    if isinstance(node, dict):
        node.setdefault(step)
        return step
    if step.isdigit() and int(step) <= len(node):
        if int(step) == len(node):
            node.append(None)
        return int(step)
    above = path.rpartition(".")[0]
    raise InputError(
        f"override {override!r}: {above} is a list of {len(node)}; "
        f"'{step}' is not one of its places 0 to {len(node)} (the last one adds an entry)"
    )
