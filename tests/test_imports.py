"""Which room may import which, which files are pure, and where the dependencies are touched.

Rooms are the folders and files at the top of `parallel_clip/`. The rules are the tables below; they
are checked against import statements, also those inside functions and for type checkers, and
against uses: every dotted name of an imported module, such as `dist.group.WORLD`.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "parallel_clip"

# From the bottom to the top; each room with those that it may import. `model`, `loss` and `data` do
# not know one another, and what runs on a layout is handed values and process groups. Pure files
# may also name one another's classes as types.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "json_file": {"errors"},
    "stages": {"errors"},
    "layout": {"errors", "stages"},
    "config": {"errors", "layout"},
    "engine": {"errors", "layout"},
    "model": {"errors", "json_file", "stages"},
    "loss": {"errors"},
    "data": {"errors", "json_file", "config"},
    "pipeline": {"errors", "layout", "stages", "engine", "model"},
    "optimizer": {"errors", "config", "layout", "stages", "engine", "model"},
}
BELOW_CHECKPOINT = {"errors", "layout", "stages", "engine", "model", "optimizer"}
BELOW_EVALUATE = {*MAY_IMPORT, "checkpoint", "convert"}
MAY_IMPORT |= {
    "checkpoint": BELOW_CHECKPOINT,
    "convert": BELOW_CHECKPOINT | {"json_file", "data", "checkpoint"},
    "evaluate": BELOW_EVALUATE,
    "plan": BELOW_EVALUATE | {"evaluate"},
    "training": BELOW_EVALUATE | {"evaluate", "plan"},
    "commands": BELOW_EVALUATE | {"evaluate", "plan", "training"},
    "cli": BELOW_EVALUATE | {"evaluate", "plan", "training", "commands"},
    "__main__": {"cli"},
}

# Files and folders that import the standard library, numpy, pydantic, yaml and one another: config
# errors are told at once, and a search asks for a thousand layouts in a second.
PURE = [
    "errors.py",
    "json_file.py",
    "config/",
    "layout.py",
    "stages/",
    "data/order/",
    "loss/exchange_plan.py",
    "pipeline/orders.py",
    "pipeline/timeline.py",
    "plan/gradient_buffers.py",
    "plan/layout_plan.py",
    "plan/segments.py",
    "plan/device_file.py",
    "plan/kernel_time.py",
    "plan/collective_time.py",
    "plan/tower_time.py",
    "plan/pipeline_time.py",
    "plan/loss_time.py",
    "plan/step_time.py",
]
PURE_MAY_USE = sys.stdlib_module_names | {"numpy", "pydantic", "pydantic_core", "yaml"}
IMPURE = ["torch", "megatron"]

# A dependency, or a part of one, and the only files and folders that may import or use it.
ONLY_IN = {
    "megatron": [
        "engine/", "model/", "pipeline/forward_backward.py", "pipeline/communicator.py",
        "optimizer/",
    ],
    "megatron.core.parallel_state": ["engine/"],
    "megatron.core.mpu": ["engine/"],
    "torch.cuda": ["engine/device.py", "engine/doctor.py"],
    "torch.distributed.init_process_group": ["engine/"],
    "torch.distributed.destroy_process_group": ["engine/"],
    "torch.distributed.new_group": ["engine/"],
    # The loss stands in an OpenCLIP script too, where all processes are data-parallel ranks.
    "torch.distributed.group.WORLD": ["engine/", "loss/contrastive.py"],
    "webdataset": ["data/tools/"],
    "open_clip": ["evaluate/prompts.py"],
    "open_clip_train": [],
    # Rooms that a config's values are handed to do not read a whole config.
    "parallel_clip.config.Config": [
        "config/", "data/", "evaluate/", "plan/", "training/", "commands.py",
    ],
}  # fmt: skip

# Megatron-core's process groups are global state: whoever asks for them by name, whatever it is
# reached through.
MEGATRON_GROUPS = "use_mpu_process_groups"


class Use(NamedTuple):
    """A dotted name that a file imports, or reaches through an import: `torch.cuda.Stream`.

    when: "load" of the file, "call" of a function, or for "types" alone. imported: by an import
    statement; `from a import b` counts as `a.b`.
    """

    file: str
    line: int
    name: str
    when: str
    imported: bool

    def below(self, name: str) -> bool:
        return f"{self.name}.".startswith(f"{name}.")


def uses_of(file: Path) -> Iterator[Use]:
    """Everything that `file` imports, and the dotted names that it reaches from there."""
    path = file.relative_to(PACKAGE).as_posix()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}  # local name: what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name.split(".")[0]: _bound(a) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name in place of a relative import"
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def walk(node: ast.AST, when: str) -> Iterator[Use]:
        if isinstance(node, ast.Import):
            yield from (Use(path, node.lineno, a.name, when, True) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (Use(path, node.lineno, name, when, True) for name in names)
        elif isinstance(node, ast.Attribute) and (parts := _dotted(node)):
            root, *rest = parts
            if root in modules:
                yield Use(path, node.lineno, ".".join([modules[root], *rest]), when, False)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            when = "types" if when == "types" else "call"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "types"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, when)

    return walk(tree, "load")


def _dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as its three names; empty where anything else is in it, such as a call."""
    if isinstance(node, ast.Name):
        return [node.id]
    parts = _dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*parts, node.attr] if parts else []


def _bound(alias: ast.alias) -> str:
    """`import a.b` makes `a` known, `import a.b as c` makes `c` known as `a.b`."""
    return alias.name if alias.asname else alias.name.split(".")[0]


FILES = sorted(PACKAGE.rglob("*.py"))
USES = [use for file in FILES for use in uses_of(file)]
IMPORTS = [use for use in USES if use.imported]


def lies_in(file: str, places: Iterable[str]) -> bool:
    """Whether `file` is one of `places` or in a folder of them, which end with a slash."""
    return any(
        file == place or (place.endswith("/") and file.startswith(place)) for place in places
    )


def module_of(file: str) -> str:
    return ".".join(["parallel_clip", *file.removesuffix(".py").split("/")]).removesuffix(
        ".__init__"
    )


NAMES = [file.relative_to(PACKAGE).as_posix() for file in FILES]
FILE_OF_MODULE = {module_of(name): name for name in NAMES}


def imported_file(use: Use) -> str | None:
    """The file of the package that an import loads: of the module, or that holds the name."""
    name = use.name
    while name.startswith("parallel_clip"):
        if name in FILE_OF_MODULE:
            return FILE_OF_MODULE[name]
        name = name.rpartition(".")[0]
    return None


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


PURE_FILES = [name for name in NAMES if lies_in(name, PURE)]


def said(uses: Iterable[Use]) -> list[str]:
    return [f"{use.file}:{use.line} {use.name}" for use in uses]


def test_every_room_has_its_rule_and_every_rule_its_room():
    rooms = {room_of(name) for name in NAMES} - {"__init__"}
    assert rooms == MAY_IMPORT.keys()


def test_rooms_import_only_rooms_below_them_by_the_rules():
    rooms = list(MAY_IMPORT)
    for position, room in enumerate(rooms):
        assert MAY_IMPORT[room] <= set(rooms[:position]), room


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_its_rule_allows(room):
    allowed = MAY_IMPORT[room] | {room, "__init__"}
    wrong = [
        use
        for use in IMPORTS
        if room_of(use.file) == room
        and (target := imported_file(use)) is not None
        and room_of(target) not in allowed
        and not (use.when == "types" and {use.file, target} <= set(PURE_FILES))
    ]
    assert said(wrong) == []


@pytest.mark.parametrize(
    "place", sorted({*PURE, *(p for places in ONLY_IN.values() for p in places)})
)
def test_what_the_rules_name_is_there(place):
    path = PACKAGE / place
    assert path.is_dir() if place.endswith("/") else path.is_file()


@pytest.mark.parametrize("file", PURE_FILES)
def test_pure_files_import_pure_files_only(file):
    wrong = []
    for use in IMPORTS:
        if use.file == file and use.when != "types":
            target = imported_file(use)
            outside = target is None and use.name.split(".")[0] not in PURE_MAY_USE
            if outside or target not in {None, "__init__.py", *PURE_FILES}:
                wrong.append(use)
    assert said(wrong) == []


def test_pure_files_load_without_torch():
    """In one process of their own, one after another."""
    script = """
import importlib, json, sys
impure, *modules = json.loads(sys.argv[1])
loaded = []
for module in modules:
    importlib.import_module(module)
    new = [name for name in impure if name in sys.modules and name not in dict(loaded)]
    loaded += [(name, module) for name in new]
print(json.dumps(loaded))
"""
    modules = [module_of(file) for file in PURE_FILES]
    command = [sys.executable, "-c", script, json.dumps([IMPURE, *modules])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []  # what was loaded, and by which file


@pytest.mark.parametrize("name", ONLY_IN)
def test_a_dependency_is_touched_in_its_own_places_only(name):
    wrong = [use for use in USES if use.below(name) and not lies_in(use.file, ONLY_IN[name])]
    assert said(wrong) == []


def test_megatron_cores_own_groups_are_asked_for_in_the_engine_only():
    wrong = [use for use in USES if MEGATRON_GROUPS in use.name and room_of(use.file) != "engine"]
    assert said(wrong) == []


def test_open_clip_is_never_loaded_with_a_file():
    assert said(use for use in IMPORTS if use.below("open_clip") and use.when == "load") == []


def test_no_files_import_one_another_in_a_circle():
    graph: dict[str, set[str]] = {name: set() for name in NAMES}
    for use in IMPORTS:
        target = imported_file(use)
        if use.when != "types" and target not in {None, use.file}:
            graph[use.file].add(target)
    assert circles(graph) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan, 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(file: str) -> None:
        number[file] = lowest[file] = len(number)
        path.append(file)
        for target in sorted(graph[file]):
            if target not in number:
                visit(target)
                lowest[file] = min(lowest[file], lowest[target])
            elif target in path:
                lowest[file] = min(lowest[file], number[target])
        if lowest[file] == number[file]:
            start = path.index(file)
            component = path[start:]
            del path[start:]
            if len(component) > 1:
                found.append(sorted(component))

    for file in graph:
        if file not in number:
            visit(file)
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d", "e"}}
    assert circles(graph) == [["a", "b", "c"]]


def test_uses_are_read_through_other_names():
    """What the rules rest on: aliases, attributes, imports inside functions."""
    names = {(use.file, use.name) for use in USES}
    assert ("loss/contrastive.py", "torch.distributed.group.WORLD") in names  # `dist.group.WORLD`
    assert any(file == "engine/groups.py" and "parallel_state" in name for file, name in names)
    lazy = [use.when for use in IMPORTS if use.below("open_clip")]
    assert lazy == ["call"]
