"""What docs/fine-tuning.md shows: its commands and programs run, its configs are those of runs that
can start, and what it says is printed is what is printed.

A config of the page is laid over that of a small run and planned: all that a dry run does but for
counting memory, which takes a second each.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml

from parallel_clip.config import Config, Freeze, Optimizer, config_from_dict
from parallel_clip.config.schema import keys_of
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.plan.describe import describe_run
from parallel_clip.plan.describe_segments import segment_table
from parallel_clip.plan.report import dry_run_report
from parallel_clip.plan.run_plan import make_run_plan
from parallel_clip.plan.update_words import update_words
from tests import reference
from tests.data.shard_files import sample, write_shard
from tests.launcher import succeed
from tests.small_world import MODEL, make_world

PAGE = (Path(__file__).parents[2] / "docs/fine-tuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PROGRAMS_OF_A_SHELL = ("parallel-clip", "python", "bash", "torchrun")


def of_language(wanted: str) -> list[str]:
    return [block for language, block in BLOCKS if language == wanted]


def alternatives(block: str) -> list[str]:
    """The configs of a YAML block: where a section comes again, another one begins."""
    configs: list[list[str]] = [[]]
    seen: set[str] = set()
    for line in block.splitlines():
        section = re.match(r"\w+", line)
        if section and section[0] in seen:
            configs.append([])
            seen.clear()
        if section:
            seen.add(section[0])
        configs[-1].append(line)
    return ["\n".join(lines) for lines in configs]


# Without a language: commands, or what is printed.
COMMANDS = [
    line
    for block in of_language("")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(PROGRAMS_OF_A_SHELL)
]
PRINTED = [block for block in of_language("") if not block.startswith(PROGRAMS_OF_A_SHELL)]
CONFIGS = [config for block in of_language("yaml") for config in alternatives(block)]
# Commands that take too long, each with what runs it instead.
NOT_RUN = {
    "bash launch/finetune_demo.sh": "minutes; tests/launch/test_finetune_demo.py runs it, short",
}
# What the page leaves open, and the last of its many shards.
IN_PLACE_OF = {"CONFIG": "config.yaml", "41455": "00001", "020": "001"}
# Below which a config of the page is a dry run, where the usual one does not do: by a line of it.
BELOW: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which the page is followed, with all that it names, small."""
    folder = tmp_path_factory.mktemp("page")
    config = yaml.safe_load(make_world(folder).read_text())
    config |= {"run_dir": "runs/a", "train": {"steps": 10}, "checkpoint": {"every": 0}}
    config["data"]["train"] = [{"shards": "own/0.tar"}]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    captions = json.dumps({"captions": ["a circle", "a ring", "a bar", "a frame", "a square"]})
    for shard in ("own/0", "noisy/00000", "noisy/00001", "clean/000", "clean/001"):
        (folder / shard).parent.mkdir(exist_ok=True)
        samples = {str(n): {**sample(n), "json": captions.encode()} for n in range(8)}
        write_shard(folder / f"{shard}.tar", samples)
    succeed("train", "config.yaml", "train.steps=1", cwd=folder)
    large = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"image_size": 128}}
    for name, model in {
        "siglip": large,
        "siglip_so400m": large,
        "vit_l_14_openclip": MODEL,
        "vit_b_16_openclip": MODEL,
        "runs/multilingual": MODEL,
        "out": MODEL,
    }.items():
        reference.make_checkpoint(model, 1, folder / name)
    (folder / "both.json").write_text(json.dumps(large))
    return folder


def merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key, as overrides do."""
    both = {
        key: merged(tree[key], value) if isinstance(value, dict) and key in tree else value
        for key, value in over.items()
    }
    return tree | both


def read(text: str) -> dict[str, Any]:
    """A config of the page, with what is here in place of what it names."""
    return yaml.safe_load(re.sub(r"\w+", lambda word: IN_PLACE_OF.get(word[0], word[0]), text))


def config_of(folder: Path, shown: dict[str, Any], **below: Any) -> Config:
    """A config of the page over the small one, with settings `below` it."""
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    if shown.get("init", {}).keys() & {"from", "vision", "text"}:
        del tree["model"]  # which is that of what it begins with
    return config_from_dict(merged(merged(tree | {"run_dir": "runs/new"}, below), shown))


def said_by(config: Config) -> str:
    plan, _ = make_run_plan(config, 1)
    return describe_run(plan)


def same_words(printed: str, shown: str) -> bool:
    """Whether a report has what the page shows, wherever lines break; `...` is any word."""
    words = [r"\S+" if word == "..." else re.escape(word) for word in shown.split()]
    return re.search(r"\s+".join(words), printed) is not None


def shown_with(*words: str) -> str:
    """The one block of what is printed that has these words."""
    (block,) = [block for block in PRINTED if all(word in block for word in words)]
    return block


def config_with(*words: str) -> dict[str, Any]:
    """The one config of the page that has these words."""
    (text,) = [text for text in CONFIGS if all(word in text for word in words)]
    return read(text)


# ---------------------------------------------------------------------------- what the page has


def test_the_page_has_blocks_of_each_kind():
    assert {language for language, _ in BLOCKS} == {"", "yaml", "python"}
    assert COMMANDS and len(CONFIGS) >= 7 and len(PRINTED) >= 3
    assert NOT_RUN.keys() <= set(COMMANDS), "what is left out is on the page"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in NOT_RUN])
def test_a_command_ends_well(folder, line):
    program, *words = shlex.split(line, comments=True)
    assert program == "parallel-clip", f"{line}: run it here, or say in NOT_RUN what does"
    assert "error" not in succeed(*(IN_PLACE_OF.get(word, word) for word in words), cwd=folder)


@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_is_one_of_a_run(folder, monkeypatch, text):
    """It changes the dry run: no key of it is one that does nothing."""
    monkeypatch.chdir(folder)
    shown = read(text)
    below = next((below for line, below in BELOW.items() if line in text), {})
    config = config_of(folder, shown, **below)
    usual = config_of(folder, {}, **below)
    assert all(getattr(config, section) != getattr(usual, section) for section in shown)
    assert said_by(config) != said_by(usual)


def test_a_wrong_key_would_be_found(folder, monkeypatch):
    """Of each config of the page, with a letter of its last key changed."""
    monkeypatch.chdir(folder)
    for text in CONFIGS:
        key = last_key(read(text))
        wrong = read(re.sub(rf"\b{key}:", f"{key}x:", text))
        with pytest.raises(InputError, match=f"{key}x"):
            config_of(folder, wrong)


def last_key(tree: Any) -> str | None:
    """The last key of the last section in a section."""
    if isinstance(tree, list):
        return last_key(tree[-1]) if tree else None
    if not isinstance(tree, dict):
        return None
    key = list(tree)[-1]
    return last_key(tree[key]) or key


def test_the_programs_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for program in of_language("python"):
        exec(program, {"open_clip": open_clip})


def test_the_keys_in_its_sentences_are_keys():
    known = [key for key, _ in keys_of(Config)]
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = set(re.findall(r"`([a-z_]+\.[a-z_.]+)", PAGE))
    named = {key.rstrip(".") for key in named if key.partition(".")[0] in sections}
    assert len(named) > 10
    for key in named:
        assert any(f"{each}.".startswith(f"{key}.") for each in known), key


# ------------------------------------------------------------------------- what it says is printed


def what_a_start_says(folder: Path) -> str:
    model = {"name": "both.json", "image_size": 192}
    return said_by(
        config_of(folder, {"init": {"vision": "siglip/", "text": "runs/a"}}, model=model)
    )


def phases_of_vit_l_14(folder: Path) -> str:
    """The columns but the last of the page, as memory takes long to count, and that one's head."""
    phases = config_with("until: 90%", "resolution: 224")
    report = dry_run_report(config_of(folder, phases), 1)
    (head,) = [line for line in report.splitlines() if line.lstrip().startswith("phase")]
    large = config_of(
        folder, phases, model={"name": "ViT-L-14"}, parallel={"pipeline": 3},
        batch={"global": 12}, train={"steps": 100_000}, optimizer={"lr": 5e-4},
    )  # fmt: skip
    plan, _ = make_run_plan(large, 3)
    rows = [line for line in segment_table(plan) if line.split()[0].isdigit()]
    return "\n".join([head, *(f"{row} 1.00" for row in rows)])


def rates_of_vit_l_14(folder: Path) -> str:
    optimizer = Optimizer(**config_with("lr_logit")["optimizer"])
    return "\n".join(update_words(load_architecture("ViT-L-14"), optimizer, Freeze()))


def what_the_sigmoid_loss_begins_with(folder: Path) -> str:
    return said_by(config_of(folder, config_with("kind: sigmoid")))


PRINTS = {
    "starts from siglip/": what_a_start_says,
    "logit_bias: measured": what_the_sigmoid_loss_begins_with,
    "phase   steps": phases_of_vit_l_14,
    "highest learning rates": rates_of_vit_l_14,
}


@pytest.mark.parametrize("block", PRINTED)
def test_what_is_said_to_be_printed_is(folder, monkeypatch, block):
    monkeypatch.chdir(folder)
    (prints,) = [prints for words, prints in PRINTS.items() if block.startswith(words)]
    printed = prints(folder)
    assert same_words(printed, block), f"{printed}\n\nand on the page:\n\n{block}"
