"""launch/finetune_demo.sh: its small pictures, the recipe, the report, and the whole of it."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from parallel_clip.convert.open import open_source
from tests.launcher import run, succeed
from tests.small_world import status

ROOT = Path(__file__).parents[2]
DATA = ROOT / "launch/demo_data"
RECIPE = ROOT / "configs/recipes/finetune_demo.yaml"
SETS = ("tuned_on", "not_tuned_on")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> None:
    """The folders of the scripts on the path, as where they are started."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT / "launch", DATA):
            patch.syspath_prepend(folder)
        yield


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("finetune_report")


def read_shard(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as shard:
        return {member.name: shard.extractfile(member).read() for member in shard}


def first_samples(source: Path, target: Path, count: int) -> None:
    """The first samples of a shard, as a shard."""
    keys: dict[str, None] = {}
    with tarfile.open(source) as shard, tarfile.open(target, "w") as short:
        for member in shard:
            keys.setdefault(member.name.partition(".")[0])
            if len(keys) > count:
                return
            short.addfile(member, shard.extractfile(member))


# ---------------------------------------------------------------------------------- small pictures


def test_a_small_picture_is_all_of_it_in_a_place_that_its_key_decides():
    make_small_pictures = importlib.import_module("make_small_pictures")
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = (200, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    corners, size = set(), make_small_pictures.SMALL
    for key in "abcdefgh":
        png = make_small_pictures.make_small(key, buffer.getvalue())
        assert png == make_small_pictures.make_small(key, buffer.getvalue())
        made = np.asarray(Image.open(io.BytesIO(png)))
        assert made.shape == (64, 64, 3)
        rows, columns = np.nonzero(np.any(made != 255, axis=2))
        top, left = int(rows.min()), int(columns.min())
        assert (rows.max() - top, columns.max() - left) == (size - 1, size - 1)
        middle = made[top + size // 2, left + size // 2]
        assert np.abs(middle.astype(int) - (200, 30, 30)).max() <= 8
        corners.add((top, left))
    assert len(corners) == 8


def test_small_pictures_keep_captions_classes_and_facts(tmp_path):
    first_samples(DATA / "test-0000.tar", tmp_path / "few.tar", 5)
    make_small_pictures = importlib.import_module("make_small_pictures")
    assert make_small_pictures.write_small(tmp_path / "few.tar", tmp_path / "small.tar") == 5
    old, new = read_shard(tmp_path / "few.tar"), read_shard(tmp_path / "small.tar")
    assert {name.replace("webp", "png") for name in old} == set(new)
    kept = {name: content for name, content in old.items() if not name.endswith(".webp")}
    assert len(kept) == 15 and kept.items() <= new.items()


# ------------------------------------------------------------------------------------------ report


def figures(recall: float, top1: float) -> dict:
    recalls = {f"{way}_recall@1": recall for way in ("image_to_text", "text_to_image")}
    return {"retrieval": {**recalls, "images": 200}, "zero_shot": {"top1": top1}}


@pytest.fixture
def made_up() -> dict:
    """A report of three mixes, of which the middle one is the best on both sets together."""
    values = [(0.01, 0.12), (0.06, 0.10), (0.08, 0.03)]
    mixes = [
        {
            "share": number / 2,
            "tuned_on": figures(tuned, 0.3),
            "not_tuned_on": figures(plain, 0.4),
        }
        for number, (tuned, plain) in enumerate(values)
    ]
    return {
        "steps": 4,
        "training_seconds": 60.0,
        "demo": {name: figures(0.02, 0.2) for name in SETS},
        "mixes": mixes,
    }


def test_recall_is_the_mean_of_both_directions(report):
    one = {"retrieval": {"image_to_text_recall@1": 0.1, "text_to_image_recall@1": 0.3}}
    assert report.recall(one) == pytest.approx(0.2)


def test_the_table_has_every_mix_and_both_sets(report, made_up):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(report.summarize(made_up))
    rows = [line for line in console.export_text().splitlines() if "%" in line]
    assert [[w for w in row.split() if w.endswith("%")] for row in rows] == [
        ["2.0%", "20.0%", "2.0%", "20.0%"],
        ["1.0%", "30.0%", "12.0%", "40.0%"],
        ["6.0%", "30.0%", "10.0%", "40.0%"],
        ["8.0%", "30.0%", "3.0%", "40.0%"],
    ]
    assert "before" in rows[1] and "1/2" in rows[2] and "after" in rows[3]
    assert report.best_mix(made_up["mixes"]) is made_up["mixes"][1]


def test_the_picture_has_the_curves_of_the_figures(report, made_up):
    over_recall, over_top1, path = report.draw(made_up).axes
    lines = {line.get_label(): line for line in over_recall.get_lines()}
    tuned, plain = lines["small pictures (tuned on)"], lines["full-size pictures (not tuned on)"]
    assert list(tuned.get_xdata()) == [0, 0.5, 1]
    assert list(tuned.get_ydata()) == [0.01, 0.06, 0.08]
    assert list(plain.get_ydata()) == [0.12, 0.10, 0.03]
    assert list(lines["chance"].get_ydata()) == [1 / 200] * 2
    assert list(over_top1.get_lines()[0].get_ydata()) == [0.3] * 3
    straight, line = path.get_lines()
    assert list(zip(*straight.get_data(), strict=True)) == [(0.12, 0.01), (0.03, 0.08)]
    assert list(zip(*line.get_data(), strict=True)) == [(0.12, 0.01), (0.10, 0.06), (0.03, 0.08)]


# ------------------------------------------------------------------------- a small run of each kind


class World:
    """A small run in the place of the demo's, and what the recipe is given for it."""

    def __init__(self, folder: Path):
        self.folder, self.demo, self.out = folder, folder / "demo", folder / "out"
        model = json.loads((ROOT / "configs/demo_model.json").read_text())
        model["embed_dim"] = 16
        model["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 8}
        model["text_cfg"] |= {"layers": 2, "width": 32}
        (folder / "model.json").write_text(json.dumps(model))
        for name in ("train-0000", "test-0000"):
            first_samples(DATA / f"{name}.tar", folder / f"{name}.tar", 16)
        make_small_pictures = importlib.import_module("make_small_pictures")
        (self.out / "small").mkdir(parents=True)
        for name in ("train-0000", "test-0000"):
            shard = f"{name}.tar"
            make_small_pictures.write_small(folder / shard, self.out / "small" / shard)
        self.small = ["batch.global=8", "batch.micro=4", "data.workers=0", "schedule.warmup=1"]
        self.keys = [
            *self.small,
            f"init.from={self.demo}",
            f"data.train.0.shards={self.out}/small/train-0000.tar",
        ]
        succeed(
            "train", ROOT / "configs/demo.yaml", *self.small, f"model.name={folder}/model.json",
            f"data.train.0.shards={folder}/train-0000.tar", "train.steps=2", "evaluate.every=0",
            f"run_dir={self.demo}",
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, scripts) -> World:
    world = World(tmp_path_factory.mktemp("finetune"))
    untrained = ["optimizer.lr=0", "train.steps=1"]
    succeed("train", RECIPE, *world.keys, *untrained, f"run_dir={world.out}/before")
    succeed("train", RECIPE, *world.keys, "train.steps=3", f"run_dir={world.out}/after")
    return world


def test_the_recipe_says_where_the_script_puts_things():
    recipe = yaml.safe_load(RECIPE.read_text())
    script = (ROOT / "launch/finetune_demo.sh").read_text()
    assert "OUT:-runs/finetune_demo}" in script and "DEMO=runs/demo" in script
    assert recipe["init"] == {"from": "runs/demo"}
    assert recipe["run_dir"] == "runs/finetune_demo/after"
    (source,) = recipe["data"]["train"]
    assert source["shards"] == "runs/finetune_demo/small/train-{0000..0007}.tar"
    assert len(list(DATA.glob("train-*.tar"))) == 8


def test_a_dry_run_of_the_recipe_says_what_is_frozen_and_resized(world):
    said = succeed(
        "train", RECIPE, *world.keys, "--dry-run", "--world-size", 2,
        f"run_dir={world.folder}/new",
    )  # fmt: skip
    assert "freeze.text: all of its" in said
    assert "vision positions interpolated from 6 x 6 to 8 x 8" in said
    assert not (world.folder / "new").exists()


def test_without_the_demos_run_the_recipe_says_what_is_missing(world):
    keys = [*world.keys, "init.from=nowhere", f"run_dir={world.folder}/new"]
    (ended,) = run("train", RECIPE, *keys)
    assert ended.code == 2 and "checkpoint nowhere does not exist" in ended.err
    assert not (world.folder / "new").exists()


def test_a_step_without_a_learning_rate_only_resizes(world):
    """`before` has the demo's bits, and positions as open_clip interpolates them."""
    from open_clip.model import resize_pos_embed

    demo, before = open_source(world.demo), open_source(world.out / "before")
    positions = "visual.positional_embedding"
    for name in set(before.shapes()) - {positions}:
        assert torch.equal(demo.read(name), before.read(name)), name

    class Model:  # as much of one as resize_pos_embed looks at
        visual = type("Visual", (), {"grid_size": (8, 8)})

    state = {positions: demo.read(positions)}
    resize_pos_embed(state, Model)
    torch.testing.assert_close(before.read(positions), state[positions])


def test_fine_tuning_leaves_the_text_tower_alone(world):
    before, after = (open_source(world.out / name) for name in ("before", "after"))
    changed = {n for n in before.shapes() if not torch.equal(before.read(n), after.read(n))}
    assert "visual.proj" in changed and len(changed) > 20
    assert all(name.startswith("visual.") or name == "logit_scale" for name in changed)


def test_the_report_has_the_figures_of_the_commands(world, report, monkeypatch, capsys, tmp_path):
    """Of `evaluate`, on the demo's run and on what `convert --mix 1/2` writes."""
    shards = {
        "tuned_on": world.out / "small/test-0000.tar",
        "not_tuned_on": world.folder / "test-0000.tar",
    }
    monkeypatch.setattr(report, "SHARES", [Fraction(0), Fraction(1, 2), Fraction(1)])
    monkeypatch.setattr(sys, "argv", [
        "finetune_report.py", str(world.out), "--demo", str(world.demo),
        "--tuned-on", str(shards["tuned_on"]), "--not-tuned-on", str(shards["not_tuned_on"]),
    ])  # fmt: skip
    assert report.main() == 0
    written = json.loads((world.out / "report.json").read_text())
    assert (world.out / "mixes.png").read_bytes().startswith(b"\x89PNG")
    assert "│ 1/2 " in capsys.readouterr().out
    assert written["steps"] == 3 and written["training_seconds"] > 0
    assert {path.name for path in world.out.iterdir()} == {
        "small", "before", "after", "report.json", "mixes.png"
    }  # fmt: skip

    before, after, mixed = world.out / "before", world.out / "after", tmp_path / "mixed"
    succeed("convert", before, mixed, "--to", "openclip", "--mix", after, "1/2")
    assert [mix["share"] for mix in written["mixes"]] == [0, 0.5, 1]
    for model, found in ((world.demo, written["demo"]), (mixed, written["mixes"][1])):
        said = succeed("evaluate", "retrieval", model, "--data", shards["tuned_on"], "--json", "-")
        assert found["tuned_on"]["retrieval"] == pytest.approx(json.loads(said))
    said = succeed(
        "evaluate", "zero-shot", mixed, "--data", shards["not_tuned_on"], "--json", "-",
        "--classes", DATA / "classes.txt", "--templates", DATA / "templates.txt",
    )  # fmt: skip
    assert written["mixes"][1]["not_tuned_on"]["zero_shot"] == pytest.approx(json.loads(said))


def test_a_report_of_no_run_is_one_message(report, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [
        "finetune_report.py", str(tmp_path), "--demo", str(tmp_path / "demo"),
        "--tuned-on", "none.tar", "--not-tuned-on", "none.tar",
    ])  # fmt: skip
    assert report.main() == 2
    assert "none.tar" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the script


def start(*keys: str, **variables: object) -> subprocess.CompletedProcess:
    fixed = {"PYTHON": sys.executable, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
    environment = {name: str(value) for name, value in (fixed | variables).items()}
    return subprocess.run(
        ["bash", ROOT / "launch/finetune_demo.sh", *keys],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_a_wrong_path_of_the_demo_ends_at_once(tmp_path):
    ended = start(DEMO=tmp_path / "nowhere", OUT=tmp_path / "out")
    assert ended.returncode == 2
    assert "nowhere does not exist" in ended.stderr and not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_script_runs_and_goes_on(world, tmp_path):
    """All of it from a small demo's run; then again, where only the report is made anew."""
    variables = {"DEMO": world.demo, "OUT": tmp_path / "out"}
    keys = [*world.small, "train.steps=2"]
    first = start(*keys, **variables)
    assert first.returncode == 0, first.stdout + first.stderr
    written = (tmp_path / "out/report.json").read_text()
    assert len(json.loads(written)["mixes"]) == 9
    again = start(*keys, **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished" in again.stdout and "Making the demo" not in again.stdout
    assert (tmp_path / "out/report.json").read_text() == written
    ended = status(tmp_path / "out/after")
    assert (ended["state"], ended["step"]) == ("finished", 2)
