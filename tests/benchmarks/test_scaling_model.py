"""The model of how runs scale says that it is one, and takes the quickest layout that fits."""

from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from parallel_clip.plan.device_file import read_device

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import scaling_model

MEMORY = 40_000_000_000


@pytest.fixture(scope="module")
def rows():
    recipe = scaling_model.RECIPES[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling_model, "PIPELINES", (1,))
        patch.setattr(scaling_model, "MICROBATCHES", (64,))
        return list(scaling_model.scale(*recipe, [8, 16], read_device("h100"), MEMORY))


def test_each_size_has_the_quickest_layout_that_fits(rows):
    sizes = [(row.scaling, row.gpus, row.batch) for row in rows]
    strong = scaling_model.STRONG_BATCH
    assert sizes == [
        ("strong", 8, strong), ("weak", 8, 512), ("strong", 16, strong), ("weak", 16, 1024),
    ]  # fmt: skip
    for row in rows:
        assert row.memory_bytes <= MEMORY
        assert row.samples_per_second == pytest.approx(row.batch / row.step_seconds)
        assert 0 < row.mfu < 1
    eight, sixteen = (row for row in rows if row.scaling == "strong")
    assert 1 < sixteen.samples_per_second / eight.samples_per_second < 2.5, (
        "a little more than twice: less of a GPU is filled"
    )


def test_tables_and_pictures_say_that_nothing_is_measured(rows):
    console = Console(file=StringIO(), width=200)
    scaling_model.print_table(console, rows, "a GPU")
    assert "a model, not measured" in console.file.getvalue()
    results = {"device": "a GPU", "environment": scaling_model.environment()}
    figure = scaling_model.draw(rows, {**results, "rows": [asdict(row) for row in rows]})
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert all(title.startswith("MODEL, not measured") for title in titles)


def test_every_recipe_is_one_of_the_configs():
    files = {path.name for path in scaling_model.CONFIGS.glob("*.yaml")}
    assert {file for file, _ in scaling_model.RECIPES} <= files
