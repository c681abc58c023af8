"""Who may import whom: the rooms of the package, and one door for each dependency.

The rules are read off the import statements, so that nothing has to be installed or run.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "parallel_clip"

# Known without torch: config errors are told at once, and other programs may read these files.
PURE = [
    "errors.py",
    "config.py",
    "config_file.py",
    "config_keys.py",
    "config_docs.py",
    "layout.py",
    "pipeline/partition.py",
    "pipeline/costs.py",
    "pipeline/orders.py",
    "pipeline/timeline.py",
    "data/order.py",
    "data/permutation.py",
    "model/architectures.py",
    "convert/names.py",
]

# Which other rooms a room may import. The pure files above are open to all; cli.py and __main__.py
# stand on top of everything. Rooms of one storey have an order too, so that nothing goes in a
# circle: conversion reads checkpoints, training evaluates, and the plan runs the trainer's code.
TOWERS = {"engine", "model"}
LOWER = TOWERS | {"loss", "data", "pipeline", "checkpoint", "convert"}
MAY_IMPORT = {
    "engine": set(),
    "model": {"engine"},
    "loss": {"engine"},
    "data": {"engine"},
    "pipeline": TOWERS,
    "checkpoint": TOWERS,
    "convert": TOWERS | {"checkpoint"},
    "evaluate": LOWER,
    "training": LOWER | {"evaluate"},
    "plan": LOWER | {"evaluate", "training"},
}


class Import(NamedTuple):
    """One imported module, by its full dotted name, and whether it happens on loading the file."""

    file: str
    module: str
    at_load: bool


def imports_of(file: Path) -> Iterator[Import]:
    """All imports in `file` but those for type checkers; `from a import b` counts as `a.b`."""
    name = file.relative_to(PACKAGE).as_posix()

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write the full name in place of a relative import"
            yield from (Import(name, f"{node.module}.{a.name}", at_load) for a in node.names)
        at_load = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load)

    return walk(ast.parse(file.read_text(encoding="utf-8")), True)


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of(file)]


def importers_of(module: str, at_load_only: bool = False) -> set[str]:
    """The files that import `module` or anything below it."""
    return {
        found.file
        for found in IMPORTS
        if f"{found.module}.".startswith(f"{module}.") and (found.at_load or not at_load_only)
    }


def is_pure(module: str) -> bool:
    """Whether `parallel_clip.…` names a pure file, or something in one."""
    return any(
        f"{module}.".startswith("parallel_clip." + name.removesuffix(".py").replace("/", ".") + ".")
        for name in PURE
    )


def room_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("parallel_clip.") else ""


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_neither_torch_nor_rooms(name):
    if not (PACKAGE / name).exists():
        pytest.skip("not written yet")
    allowed = sys.stdlib_module_names | {"numpy", "pydantic", "pydantic_core", "yaml"}
    for found in IMPORTS:
        if found.file == name and not found.module.startswith("parallel_clip"):
            assert found.module.split(".")[0] in allowed, found
        elif found.file == name and room_of(found.module) != name.partition("/")[0]:
            assert is_pure(found.module), found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room):
    for found in IMPORTS:
        target = room_of(found.module)
        if found.file.startswith(f"{room}/") and target in MAY_IMPORT.keys() - {room}:
            assert target in MAY_IMPORT[room] or is_pure(found.module), found


def test_every_room_has_its_rule():
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert rooms <= MAY_IMPORT.keys()


def test_nothing_imports_the_command_line():
    assert importers_of("parallel_clip.cli") <= {"__main__.py"}


def test_megatron_core_has_few_doors():
    doors = ("engine/", "model/", "pipeline/", "training/optimizer.py")
    assert [file for file in sorted(importers_of("megatron")) if not file.startswith(doors)] == []


def test_megatron_cores_global_state_is_touched_in_the_engine_only():
    for module in ("megatron.core.parallel_state", "megatron.core.mpu"):
        assert all(file.startswith("engine/") for file in importers_of(module))


def test_webdataset_is_known_to_the_data_room_only():
    assert all(file.startswith("data/") for file in importers_of("webdataset"))


def test_open_clip_is_no_dependency():
    assert importers_of("open_clip") <= {"evaluate/prompts.py", "data/tokenizer.py"}
    assert importers_of("open_clip", at_load_only=True) == set()


def test_the_config_and_the_layout_load_without_torch():
    loaded = "import sys, parallel_clip.config, parallel_clip.layout; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
