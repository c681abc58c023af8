"""The user who does everything wrong: one message, by rank 0, and nothing written.

Each case is run in one process, in two, and as a dry run of one and of two.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.data.shard_files import sample, write_shard
from tests.launcher import Ended, run, start, succeed
from tests.reference import make_checkpoint
from tests.small_world import MODEL, make_world, state_of

# Sections of MODEL with something else in it.
OTHER = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"width": 48, "head_width": 12}}
POOLED = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"attentional_pool": True}}
THREE_HEADS = MODEL | {"text_cfg": MODEL["text_cfg"] | {"width": 36, "heads": 3}}


class _Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a good config and with everything that may be wrong beside it."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    for name, model in (("other", OTHER), ("pooled", POOLED), ("three_heads", THREE_HEADS)):
        (folder / f"{name}.json").write_text(json.dumps(model))
    make_checkpoint(OTHER, 0, folder / "other")
    whole_shard = (folder / "train/000000.tar").read_bytes()
    (folder / "broken").mkdir()
    (folder / "broken/empty.tar").write_bytes(b"")
    (folder / "broken/cut.tar").write_bytes(whole_shard[: len(whole_shard) // 2])
    write_shard(folder / "broken/pictures.tar", {"0": {"jpg": sample(0)["jpg"]}})
    (folder / "bert").mkdir()
    (folder / "bert/config.json").write_text('{"model_type": "bert"}')
    (folder / "garbage.bin").write_bytes(b"garbage" * 100)
    (folder / "garbage.safetensors").write_bytes(b"garbage" * 100)
    (folder / "pickled.pt").write_bytes(pickle.dumps({"logit_scale": _Trap(folder / "sprung")}))
    torch.save({"logit_scale": _Trap(folder / "sprung")}, folder / "trap.pt")
    torch.save({"logit_scale": torch.zeros(())}, folder / "bare.pt")
    (folder / "file").write_text("")
    (folder / "full").mkdir()
    (folder / "full/thesis.tex").write_text("mine")
    (folder / "classes.txt").write_text("circle\nsquare\n")
    (folder / "no_slot.txt").write_text("a photo\n")
    (folder / "list.yaml").write_text("- seed: 0\n")
    (folder / "broken.yaml").write_text("batch: [1\n  seed: }\n")
    return folder


# Overrides of a good config, with what the message must say. {} is the world's folder.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["batch.globl=8"], ["unknown key batch.globl", "batch.global?"]),
    "unknown section": (["optimiser.lr=1"], ["unknown key optimiser", "optimizer?"]),
    "wrong type": (["batch.global=eight"], ['batch.global is "eight"', "integer"]),
    "several": (["batch.globl=1", "seed=x"], ["2 problems", "batch.globl", 'seed is "x"']),
    "no override": (["batch.global"], ["key=value"]),
    "heads": (
        ["parallel.tensor=2", "model.name={}/three_heads.json"],
        ["parallel.tensor 2", "3 heads of the text tower", "may be 1"],
    ),
    "heads of a known model": (
        ["parallel.tensor=8", "model.name=ViT-L-14"],
        ["parallel.tensor 8", "12 heads of the text tower", "may be 1, 2 or 4"],
    ),
    "batch": (["batch.global=12", "batch.micro=8"], ["batch.global 12", "batch.micro 8", "16"]),
    "world": (["parallel.tensor=4"], ["parallel.tensor 4", "start 4 processes"]),
    "pipeline": (["parallel.pipeline=3"], ["cannot be split", "parallel.pipeline 3"]),
    "stash": (["parallel.stash=3"], ["parallel.stash 3", "microbatches"]),
    "two lengths": (["train.samples=9"], ["exactly one", "train.steps and train.samples"]),
    "too short": (["train.steps=null", "train.samples=4"], ["train.samples 4", "at least 8"]),
    "missing shards": (["data.train.0.shards={}/no/{{0..3}}.tar"], ["4 of 4 shards", "no/0.tar"]),
    "empty shard": (["data.train.0.shards={}/broken/empty.tar"], ["empty.tar", "0 bytes"]),
    "cut shard": (
        ["data.train.0.shards={}/train/000000.tar::{}/broken/cut.tar"],
        ["cut.tar", "breaks off", "fetch or write it again"],
    ),
    "no captions": (["data.train.0.shards={}/broken/pictures.tar"], ["pictures.tar", "no .txt"]),
    "no such caption": (["data.caption_key=title"], ["no .json", "data.caption_key"]),
    "remote shards": (["data.train.0.shards=gs://bucket/0.tar"], ["gs://", "pip install gcsfs"]),
    "augmentation": (["data.augment_options.blur=1"], ["augment_options.blur", "ratio"]),
    "unknown model": (["model.name=ViT-L-41"], ["ViT-L-41", "ViT-L-14"]),
    "tokenizer": (["model.name=ViT-L-14-CLIPA"], ["bert-base-uncased", "data.tokenizer="]),
    "tokenizer folder": (["data.tokenizer={}/full"], ["data.tokenizer", "tokenizer.json"]),
    "switch": (["model.name={}/pooled.json"], ["vision_cfg.attentional_pool", "not supported"]),
    "other weights": (["init.from={}/other"], ["vision_cfg.width is 48 there and 32 here"]),
    "no weights": (["init.from={}/nowhere"], ["nowhere does not exist", "OpenCLIP"]),
    "garbage": (["init.from={}/garbage.bin"], ["garbage.bin", "fetched again"]),
    "garbage tensors": (["init.from={}/garbage.safetensors"], ["garbage.safetensors", "header"]),
    "pickled code": (["init.from={}/pickled.pt"], ["pickled.pt", "code could be run"]),
    "code in torch": (["init.from={}/trap.pt"], ["trap.pt", "code could be run"]),
    "run_dir a file": (["run_dir={}/file"], ["run_dir", "is a file"]),
    "run_dir below a file": (["run_dir={}/file/a/b"], ["run_dir", "is a file"]),
    "run_dir of another": (["run_dir={}/full"], ["full is not empty", "new or empty folder"]),
    "no classes": (
        ["evaluate.zero_shot={{shards: {}/train, classes: {}/nowhere.txt}}"],
        ["class names", "nowhere.txt"],
    ),
    "bad templates": (
        ["evaluate.zero_shot={{shards: {}/train, classes: {}/classes.txt, "
         "templates: {}/no_slot.txt}}"],
        ["no_slot.txt", "'a photo'"],
    ),
    "no labels": (
        ["evaluate.zero_shot={{shards: {}/train, classes: {}/classes.txt}}"],
        ["none of the first 40 samples", ".cls"],
    ),
    "held out missing": (["evaluate.retrieval={}/no.tar"], ["1 of 1 shards", "no.tar"]),
    "held out cut": (["evaluate.loss={}/broken/cut.tar"], ["cut.tar", "breaks off"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_one_message(world, case):
    overrides, expected = WRONG[case]
    overrides = [text.format(*[world] * text.count("{}")) for text in overrides]
    train = ["train", world / "config.yaml", *overrides]
    before = state_of(world)
    started = [
        start(*train),
        start(*train, processes=2),
        start(*train, "--dry-run"),
        start(*train, "--dry-run", "--world-size", 2),
    ]
    one, two, dry_one, dry_two = (running.wait() for running in started)
    messages = [one_message(ended) for ended in (one, two, dry_one, dry_two)]
    assert messages[0] == messages[2] and messages[1] == messages[3]
    for words in expected:
        assert all(words in message for message in messages[:2]), (words, messages)
    assert state_of(world) == before and not (world / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused(world):
    """/proc takes no folders, whatever its permissions say, even to root."""
    before = state_of(world)
    for processes in (1, 2):
        wrong = run("train", world / "config.yaml", "run_dir=/proc/run", processes=processes)
        message = one_message(wrong)
        assert "run_dir /proc/run" in message and "choose another run_dir" in message
    assert state_of(world) == before


def one_message(ranks: list[Ended]) -> str:
    """What rank 0 said, once; every rank ended with code 2."""
    assert [ended.code for ended in ranks] == [2] * len(ranks), ranks
    assert not any(ended.err or ended.out for ended in ranks[1:]), ranks
    message = ranks[0].err
    assert message.startswith("parallel-clip: ") and message.count("parallel-clip: ") == 1
    assert "Traceback" not in message and "Warning" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "nowhere.yaml"], "cannot read the config file nowhere.yaml"),
        (["train", "broken.yaml"], "broken.yaml, line 2"),
        (["train", "list.yaml"], "a config is a mapping"),
        (["train", "."], "Is a directory"),
        (["train", "config.yaml", "--world-size", "2"], "--world-size is for --dry-run"),
        (["train", "config.yaml", "--dry-run", "--world-size", "0"], "'0' is not a whole number"),
        (["train", "config.yaml", "--dryrun"], "--dryrun"),
        (["train"], "CONFIG"),
        (["tran", "config.yaml"], "'tran'"),
        ([], "COMMAND"),
        (["plan", "config.yaml", "--gpus", "8", "--gpu-memory", "80"], "has no unit"),
        (["convert", "bert", "new", "--to", "run"], "CLIPModel and SiglipModel"),
        (["convert", "other", "new", "--to", "huggingface", "--bin"], "--bin is for --to openclip"),
        (["convert", "other", "new", "--to", "openclip", "--license", "My own"], "of a licence"),
        (["convert", "other", "full", "--to", "openclip"], "full is not empty"),
        (["convert", "other", "file/new", "--to", "openclip"], "file/new: "),
        (["convert", "nowhere", "new", "--to", "openclip"], "nowhere does not exist"),
        (["convert", "train", "new", "--to", "run"], "train holds no checkpoint"),
        (["convert", "other", "new", "--to", "run", "--bin"], "leave --bin"),
        (["convert", "other", "new", "--to", "openclip", "--model", "ViT-B-32"], "another model"),
        (["evaluate", "retrieval", "other", "--data", "no.tar"], "1 of 1 shards"),
        (["evaluate", "retrieval", "nowhere", "--data", "train"], "nowhere does not exist"),
        (["evaluate", "retrieval", "other", "--data", "broken/pictures.tar"], "no .txt"),
        (
            ["evaluate", "retrieval", "other", "--data", "train", "--tensor", "2"],
            "start 2 processes",
        ),
        (["evaluate", "retrieval", "trap.pt", "--data", "train", "--model", "ViT-B-32"], "trap.pt"),
        (["evaluate", "retrieval", "trap.pt", "--data", "train"], "code could be run"),
        (["evaluate", "retrieval", "bare.pt", "--data", "train"], "--model NAME"),
        (["evaluate", "retrieval", "other", "--data", "train", "--json", "file/x"], "file/x"),
        (
            ["evaluate", "zero-shot", "other", "--data", "train", "--classes", "no.txt"],
            "class names",
        ),
        (
            ["evaluate", "zero-shot", "other", "--data", "train", "--classes", "classes.txt"],
            "no .cls",
        ),
        (["evaluate", "zero-shot", "other", "--data", "train"], "--classes"),
        (["data", "index", "broken/cut.tar"], "breaks off"),
        (["data", "index", "nowhere.tar"], "1 of 1 shards"),
        (["data", "check", "nowhere.tar"], "1 of 1 shards"),
        (["data", "pack", "nowhere", "new"], "neither a folder"),
        (["data", "pack", "full", "new"], "holds no pictures"),
        (["data", "pack", "full", "train"], "holds shards already"),
    ],
)
def test_wrong_commands_end_with_one_message(world, arguments, expected):
    before = state_of(world)
    message = one_message(run(*arguments, cwd=world))
    assert expected in message
    assert state_of(world) == before and not (world / "new").exists()


def test_nothing_in_a_checkpoint_was_run(world):
    """After all cases above: the traps did not spring."""
    assert not (world / "sprung").exists()


HELP = [
    [], ["train"], ["evaluate"], ["evaluate", "zero-shot"], ["evaluate", "retrieval"], ["convert"],
    ["data"], ["data", "index"], ["data", "check"], ["data", "pack"], ["plan"], ["doctor"],
]  # fmt: skip


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_every_command_has_help(command):
    text = succeed(*command, "--help")
    assert text.startswith(f"usage: {' '.join(['parallel-clip', *command])}")
    assert max(map(len, text.splitlines())) <= 80


def test_overrides_may_stand_before_and_behind_options(world):
    config = world / "config.yaml"
    before = state_of(world)
    orders = [
        succeed("train", config, "seed=1", "batch.micro=2", "--dry-run", "--world-size", 2),
        succeed("train", config, "--dry-run", "--world-size", 2, "seed=1", "batch.micro=2"),
        succeed("train", "--dry-run", config, "seed=1", "--world-size", 2, "batch.micro=2"),
    ]
    assert orders[0] == orders[1] == orders[2]
    assert "2 data-parallel × 2 microbatches × 2" in orders[0]
    assert state_of(world) == before


def test_a_dry_run_tells_the_layout_of_ranks_that_are_not_there(world):
    text = succeed("train", world / "config.yaml", "--dry-run", "--world-size", 8,
                   "parallel.tensor=4", "parallel.sequence=true")  # fmt: skip
    assert "on 8 processes: data 2 × tensor 4" in text
    assert "1 of 4 heads and 32 of 128 MLP channels" in text
    for held in ("million parameters", "weights", "gradients", "optimizer", "saved activations"):
        assert held in text


def test_the_doctor_names_what_is_installed():
    text = succeed("doctor")
    for what in ("torch", "megatron-core", "devices", "apex"):
        assert what in text
