"""The plans that docs/planning.md shows are what its commands give."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import succeed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Four models on 8, 128 and 1,024 GPUs")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^parallel-clip (plan .*)$", SECTION, re.MULTILINE)
SHOWN = 3


def rows_of(plan: dict[str, Any]) -> list[str]:
    """The rows of the page, from the JSON of a plan: the best of each tensor, pipeline and virtual
    pipeline size, as the command shows them."""
    best: dict[tuple, dict[str, Any]] = {}
    for layout in plan["layouts"]:
        sizes = layout["tensor"], layout["pipeline"], layout["virtual_pipeline"]
        best.setdefault(sizes, layout)
    return [_row(plan, layout) for layout in list(best.values())[:SHOWN]]


def _row(plan: dict[str, Any], layout: dict[str, Any]) -> str:
    count = plan["batch"] // (layout["data"] * layout["micro"])
    kept = {0: "none", count: "all"}.get(layout["stash"], str(layout["stash"]))
    columns = (
        f"{plan['gpus']:,}",
        f"{layout['tensor']} × {layout['pipeline']} × {layout['data']:,}",
        layout["virtual_pipeline"],
        f"{count} of {layout['micro']}",
        kept,
        layout["recompute"],
        f"{layout['step_seconds']:.2f} s",
        f"{layout['samples_per_second']:,.0f}",
        f"{layout['mfu']:.1%}",
        f"{layout['memory_bytes']['total'] / 1e9:.1f}",
    )
    return f"| {' | '.join(map(str, columns))} |"


def test_the_page_has_each_model_at_each_size():
    assert len(COMMANDS) == 12
    models = [command.split("batch.global")[0] for command in COMMANDS]
    assert len(set(models)) == 4
    assert [re.search(r"--gpus (\d+)", command)[1] for command in COMMANDS] == [
        "8", "128", "1024",
    ] * 4  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.long] * (number > 0))  # minutes for 1,024 GPUs
        for number, command in enumerate(COMMANDS)
    ],
)
def test_a_command_of_the_page_gives_what_the_page_shows(command, tmp_path):
    file = tmp_path / "plan.json"
    said = succeed(*shlex.split(command), "--json", str(file), cwd=ROOT)
    assert "predicted, not measured" in said
    for row in rows_of(json.loads(file.read_text())):
        assert row in SECTION
