"""docs/architecture.md names files, classes and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "parallel_clip"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")

# `path`, `folder/` or `path:name`, where a name is a function, a class or `Class.method`.
PATHS = sorted(set(re.findall(r"`([a-z_/]+(?:\.py|/))(?::[\w.]+)?`", PAGE)))
NAMES = sorted(set(re.findall(r"`([a-z_/]+\.py):([\w.]+)`", PAGE)))


def defined_in(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    """Functions, classes and methods: `train`, `Order`, `Order.at`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= defined_in(node, f"{prefix}{node.name}.")
    return found


def test_the_page_names_the_way_of_a_batch():
    assert len(NAMES) >= 20 and len(PATHS) >= len({path for path, _ in NAMES})


@pytest.mark.parametrize("path", PATHS)
def test_a_file_on_the_page_is_there(path):
    found = (ROOT if path.startswith(("tests/", "parallel_clip/")) else PACKAGE) / path
    assert found.is_dir() if path.endswith("/") else found.is_file()


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_name_on_the_page_is_defined_in_its_file(path, name):
    assert name in defined_in(ast.parse((PACKAGE / path).read_text(encoding="utf-8")))


def test_every_room_is_on_the_page():
    rooms = {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(PATHS)


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\((docs/[\w-]+\.md)\)", readme))
