"""The commands one after another: pack, index, train, convert, evaluate, and on from there."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tests.data.shard_files import picture, sample, write_shard
from tests.launcher import run, succeed
from tests.small_world import MODEL, make_world, metrics, tensors

RETRIEVAL = {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config, with `held_out.tar` beside it: 20 pictures of 3 classes, 1 to 3 captions each."""
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder)
    samples = {f"{number:03d}": dict(sample(number)) for number in range(20)}
    for number, files in enumerate(samples.values()):
        captions = [f"caption {i} of picture {number}" for i in range(number % 3 + 1)]
        files["txt"] = "\n".join(captions).encode()
        files["json"] = json.dumps({"captions": captions}).encode()
        files["cls"] = str(number % 3).encode()
    write_shard(folder / "held_out.tar", samples)
    (folder / "classes.txt").write_text("red circle\nblue square\ngreen ring\n")
    (folder / "templates.txt").write_text("a {}\nthe {}.\n")
    return path


@pytest.fixture(scope="module")
def trained(config) -> Path:
    """A run of two processes with tensor parallelism, evaluated on its way by workers."""
    folder = config.parent
    overrides = [
        "parallel.tensor=2", "parallel.sequence=true", "evaluate.every=4",
        "evaluate.workers=1", "data.workers=1",
        f"evaluate.loss={folder}/held_out.tar", f"evaluate.retrieval={folder}/held_out.tar",
        f"evaluate.zero_shot={{shards: {folder}/held_out.tar, classes: {folder}/classes.txt}}",
    ]  # fmt: skip
    succeed("train", config, *overrides, processes=2)
    return folder / "run"


@pytest.fixture(scope="module")
def converted(trained) -> Path:
    target = trained.parent / "openclip"
    succeed("convert", trained, target, "--to", "openclip", "--bin")
    return target


def figures(*arguments: object, processes: int = 1) -> dict[str, float]:
    """The JSON of an evaluation, which is all that it prints."""
    return json.loads(succeed("evaluate", *arguments, "--json", "-", processes=processes))


def test_evaluations_are_kept_and_shown(trained, config):
    kept = [json.loads(line) for line in (trained / "evaluations.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in kept] == [4, 6]
    data = config.parent / "held_out.tar"
    found = figures("retrieval", trained, "--data", data)
    assert kept[-1]["retrieval"] == pytest.approx(found)
    found = figures(
        "zero-shot", trained, "--data", data, "--classes", config.parent / "classes.txt"
    )
    assert kept[-1]["zero_shot"] == pytest.approx(found)


@pytest.mark.parametrize("kind", ["retrieval", "zero-shot"])
def test_figures_do_not_depend_on_the_layout_nor_the_kind_of_checkpoint(
    trained, converted, config, tmp_path, kind
):
    folder = config.parent
    model = folder / "model.json"
    data = ["--data", folder / "held_out.tar", "--batch", 7]
    tensor = 2 if kind == "retrieval" else 3  # which 4 heads are padded for
    if kind == "zero-shot":
        data += ["--classes", folder / "classes.txt", "--templates", folder / "templates.txt"]
    bare = tmp_path / "weights.pt"
    torch.save(load_file(converted / "open_clip_model.safetensors"), bare)
    expected = figures(kind, trained, *data)
    others = [
        figures(kind, trained, *data, processes=2),
        figures(kind, trained, *data, "--tensor", tensor, processes=tensor),
        figures(kind, trained / "checkpoints/step_00000006", *data, "--workers", 2),
        figures(kind, converted, *data),
        figures(kind, converted / "open_clip_model.safetensors", *data),
        figures(kind, converted / "open_clip_pytorch_model.bin", *data),
        figures(kind, bare, "--model", model, *data),
    ]
    assert all(other == pytest.approx(expected) for other in others), (expected, others)


def test_the_figures_are_those_of_the_contract(trained, config, tmp_path):
    folder, target = config.parent, tmp_path / "figures.json"
    data = ["--data", folder / "held_out.tar", "--json", target]
    shown = succeed("evaluate", "retrieval", trained, *data)
    assert "Retrieval" in shown and "image to text recall@10" in shown
    found = json.loads(target.read_text())
    assert found.keys() >= RETRIEVAL | {"images", "texts"}
    assert (found["images"], found["texts"]) == (20, 39)
    assert all(0 <= found[name] <= 1 for name in RETRIEVAL)
    succeed("evaluate", "zero-shot", trained, *data, "--classes", folder / "classes.txt")
    found = json.loads(target.read_text())
    assert (found["samples"], found["classes"], found["top5"]) == (20, 3, 1.0)
    openai = ["--classes", folder / "classes.txt", "--templates", "openai"]
    assert 0 <= figures("zero-shot", trained, *data[:2], *openai)["top1"] <= 1


def test_captions_may_be_a_list_in_the_json(trained, config):
    data = ["--data", config.parent / "held_out.tar"]
    listed = figures("retrieval", trained, *data, "--caption-key", "captions")
    assert listed == figures("retrieval", trained, *data)


def test_open_clip_loads_what_is_converted(converted, trained):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{converted}")
    state = model.state_dict()
    written = load_file(converted / "open_clip_model.safetensors")
    assert written.keys() == state.keys() - {"attn_mask"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    pickled = torch.load(converted / "open_clip_pytorch_model.bin", weights_only=True)
    assert all(torch.equal(tensor, pickled[name]) for name, tensor in written.items())
    settings = json.loads((converted / "open_clip_config.json").read_text())
    assert settings["model_cfg"] == MODEL and "mean" in settings["preprocess_cfg"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_precision_is_the_one_asked_for(trained, converted, tmp_path, precision):
    succeed("convert", trained, tmp_path, "--to", "openclip", "--precision", precision)
    whole = load_file(converted / "open_clip_model.safetensors")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, tensor in load_file(tmp_path / "open_clip_model.safetensors").items():
        own = torch.float32 if name == "logit_scale" else dtype
        assert torch.equal(tensor, whole[name].to(own)), name


def test_weights_come_back_bit_for_bit(converted, tmp_path):
    succeed("convert", converted, tmp_path / "run", "--to", "run")
    succeed("convert", tmp_path / "run", tmp_path / "again", "--to", "openclip")
    assert tensors(tmp_path / "again") == tensors(converted)
    for name in ("openclip", "run"):
        (ended,) = run("convert", converted, tmp_path / "run", "--to", name)
        assert ended.code == 2 and "not empty" in ended.err


def test_a_damaged_checkpoint_leaves_no_folder_behind(converted, tmp_path):
    weights = (converted / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/open_clip_model.safetensors").write_bytes(weights[:-1000])
    settings = (converted / "open_clip_config.json").read_text()
    (tmp_path / "cut/open_clip_config.json").write_text(settings)
    run_folder = tmp_path / "run"
    succeed("convert", converted, run_folder, "--to", "run")
    pieces = next(run_folder.glob("checkpoints/step_00000000/*.safetensors"))
    pieces.write_bytes(pieces.read_bytes()[:-1000])
    for source in (tmp_path / "cut", run_folder):
        for name in ("openclip", "run"):
            (ended,) = run("convert", source, tmp_path / "new", "--to", name)
            assert ended.code == 2 and "Traceback" not in ended.err, ended
            assert not (tmp_path / "new").exists()


def test_a_converted_run_is_taken_by_all(converted, config, tmp_path):
    """As the folder to go on in, as `init.from`, and by `evaluate`: the same weights each time."""
    folder, data = tmp_path / "run", ["--data", config.parent / "held_out.tar"]
    succeed("convert", converted, folder, "--to", "run")
    assert figures("retrieval", folder, *data) == figures("retrieval", converted, *data)
    for name, overrides in {
        "from_openclip": [f"init.from={converted}"],
        "from_run": [f"init.from={folder}"],
        "run": [],
    }.items():
        succeed("train", config, f"run_dir={tmp_path / name}", "train.steps=2", *overrides)
    losses = [
        [line["loss"] for line in metrics(tmp_path / name)]
        for name in ("from_openclip", "from_run", "run")
    ]
    assert losses[0] == losses[1] == losses[2]


def test_pack_index_check_train(config, tmp_path):
    """A folder of pictures becomes shards that everything reads."""
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"pictures/{number}.txt").write_text(f"picture {number}\nnumber {number}")
    shards = tmp_path / "shards"
    succeed("data", "pack", tmp_path / "pictures", shards, "--samples-per-shard", 5)
    assert sorted(path.name for path in shards.iterdir()) == [
        "000000.tar", "000001.tar", "000002.tar",
    ]  # fmt: skip
    assert "3 shards, 12 samples" in succeed("data", "check", shards)
    assert "3 shards, 12 samples" in succeed("data", "index", shards)
    assert (shards / "shards.index").is_file()
    run_dir = tmp_path / "run"
    said = succeed("train", config, f"data.train.0.shards={shards}", f"run_dir={run_dir}",
                   "train.steps=null", "train.epochs=2")  # fmt: skip
    assert "making the index" not in said
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]


def test_several_sources_are_weighted(config, tmp_path):
    folder = config.parent
    sources = (
        f"data.train=[{{shards: {folder}/held_out.tar, weight: 1.5}}, "
        f"{{shards: {folder}/train, samples: 10}}]"
    )
    run_dir = tmp_path / "run"
    succeed("train", config, sources, f"run_dir={run_dir}", "train.steps=5")  # 40 = 1.5 x 20 + 10
    seen = [json.loads(line) for line in (run_dir / "ledger/rank_00000.jsonl").open()]
    counts = [sum(line["source"] == source for line in seen) for source in (0, 1)]
    assert counts == [30, 10]
