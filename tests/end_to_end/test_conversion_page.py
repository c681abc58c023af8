"""The commands of docs/conversion.md, one after another, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from parallel_clip.convert.open import open_source
from tests import reference
from tests.data.shard_files import sample, write_shard
from tests.launcher import succeed
from tests.small_world import MODEL, make_world, metrics

PAGE = (Path(__file__).parents[2] / "docs/conversion.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if not language and line.startswith("parallel-clip ")
]
PROGRAMS = [block for language, block in BLOCKS if language == "python"]
# What the page leaves open, and a model and a batch of this size.
IN_PLACE_OF = {"CONFIG": "config.yaml", "ViT-L-14": "model.json", "32768": "8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which the page is followed: a run, a run of open_clip_train, held-out data."""
    folder = tmp_path_factory.mktemp("page")
    config = yaml.safe_load(make_world(folder).read_text())
    config |= {"run_dir": "runs/demo", "train": {"steps": 4}, "checkpoint": {"every": 0}}
    config["evaluate"] = {"every": 4, "loss": str(folder / "held_out/0.tar"), "workers": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "held_out").mkdir()
    for shard in range(2):
        samples = {f"{shard}{number}": dict(sample(number)) for number in range(4)}
        write_shard(folder / f"held_out/{shard}.tar", samples)
    succeed("train", "config.yaml", "ema.decay=0.9", cwd=folder)
    (folder / "logs/x/checkpoints").mkdir(parents=True)
    make_openclip_run(folder / "logs/x/checkpoints/epoch_7.pt")
    return folder


def make_openclip_run(file: Path) -> None:
    """What open_clip_train saves after two steps."""
    model = reference.build_model(MODEL)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if not reference.decayed(n, p)]},
        {"params": [p for n, p in named.items() if reference.decayed(n, p)]},
    ]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 7, "state_dict": state, "optimizer": optimizer.state_dict()}, file)


@pytest.fixture(scope="module")
def said(folder) -> list[str]:
    """What each command of the page prints."""
    return [
        succeed(*(IN_PLACE_OF.get(word, word) for word in command), cwd=folder)
        for command in COMMANDS
    ]


def test_the_page_has_commands_of_each_kind():
    words = [" ".join(command) for command in COMMANDS]
    kinds = ("--to openclip", "--to huggingface", "--to run", "init.from=", "evaluate")
    for kind in (*kinds, "--ema", "--mix"):
        assert any(kind in line for line in words), kind
    assert len(COMMANDS) >= 10


def test_every_command_of_the_page_ends_well(said, folder):
    assert len(said) == len(COMMANDS) and all("error" not in out for out in said)
    assert {f.name for f in folder.iterdir()} >= {"out", "hf", "runs", "logs"}


def test_the_programs_of_the_page_run(said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for program in PROGRAMS:
        exec(program, names)
    assert names["model"].config.model_type == "clip"
    assert names["classify"].model.config.model_type == "clip"


def test_a_run_starts_from_transformers_as_from_the_run_itself(said, folder):
    """The same loss at the first step, whatever the weights have been through."""
    succeed("train", "config.yaml", "run_dir=runs/own", "init.from=runs/demo", cwd=folder)
    expected = metrics(folder / "runs/own")[0]["loss"]
    assert metrics(folder / "runs/more")[0]["loss"] == expected
    succeed("train", "config.yaml", "run_dir=runs/again", cwd=folder)
    assert metrics(folder / "runs/again")[0]["loss"] == expected


def test_the_figures_of_an_evaluation_are_the_runs(said, folder):
    data = ["--data", "held_out/{0..1}.tar", "--json", "-"]
    figures = [
        json.loads(succeed("evaluate", "retrieval", checkpoint, *data, cwd=folder))
        for checkpoint in ("runs/demo", "hf/")
    ]
    assert figures[1] == pytest.approx(figures[0])


def test_the_card_has_the_facts_of_the_run(said, folder):
    card = (folder / "hf/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\n")
    for words in (
        "| optimizer steps | 4 |",
        "| pairs seen | 32 |",
        "40 pairs; 32 seen",
        "Evaluated",
    ):
        assert words in card, words
    assert str(folder) not in card
    assert "license:" not in (folder / "out/README.md").read_text()
    assert open_source(folder / "hf").metadata.architecture.json["embed_dim"] == MODEL["embed_dim"]
