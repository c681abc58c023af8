"""launch/environment.sh looks for what setup.py installs; an error names the extra that lacks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    "moto[server]": "moto.server",  # of packages whose module has another name
    "megatron-core": "megatron.core",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
    "open_clip_torch": "open_clip",
    "protobuf": "google.protobuf",
}


def setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == "setup"
    )
    return {keyword.arg: keyword.value for keyword in call.keywords}


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func)


ARGUMENTS = setup_arguments()
BASE = ast.literal_eval(ARGUMENTS["install_requires"])
EXTRAS = ast.literal_eval(ARGUMENTS["extras_require"])


def modules_of(requirements: list[str]) -> set[str]:
    packages = [requirement.partition(">")[0] for requirement in requirements]
    return {MODULES.get(package, package) for package in packages}


@pytest.mark.parametrize("extras", [[], *([extra] for extra in EXTRAS), ["demo", "test"]], ids=str)
def test_the_modules_looked_for_are_those_that_setup_installs(extras, tmp_path):
    python = tmp_path / "python"  # prints what it is asked to look for
    python.write_text('#!/bin/bash\nprintf "%s\\n" "${@:2}"\n')
    python.chmod(0o755)
    script = 'source launch/environment.sh; _missing_modules "$@"'
    command = ["bash", "-c", script, "bash", python, *extras]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = modules_of([*BASE, *(package for extra in extras for package in EXTRAS[extra])])
    assert set(done.stdout.split()) == wanted


def test_training_needs_no_matplotlib():
    assert "matplotlib" not in modules_of(BASE)


@pytest.mark.parametrize(
    ("script", "extra"), [("benchmarks/common.py", "benchmark"), ("launch/demo_report.py", "demo")]
)
def test_a_picture_without_matplotlib_names_the_extra(script, extra):
    without = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", without, ROOT / script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"pip install 'parallel_clip[{extra}]'" in done.stderr and "matplotlib" in done.stderr
