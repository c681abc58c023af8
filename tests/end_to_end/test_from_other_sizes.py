"""Runs that begin at another size, or with towers of two checkpoints: their weights of step 0 give
the features that open_clip gives once it has loaded the same files at that size."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import timm
import torch
import yaml

from parallel_clip.evaluate.encoder import load_encoder
from tests import reference
from tests.launcher import run, succeed
from tests.small_models import distance, image_batch, timm_model, token_batch
from tests.small_world import MODEL, make_world

# The weights stay as they are: what a run saves after a step is what it began with.
STILL = ["optimizer.lr=0", "optimizer.weight_decay=0", "schedule.kind=constant", "train.steps=1"]
WORDS = {"vocab_size": 49408, "context_length": 16}
SIGLIP = timm_model(
    "vit_base_patch16_siglip_224",
    {"timm_pool": "map", "timm_proj": "none", "image_size": 32},
    {"proj_bias": True, "pool_type": "last", "no_causal_mask": True, **WORDS},
    embed_dim=48,
    init_logit_bias=-10,
)
PE_CORE = timm_model(
    "vit_pe_core_base_patch16_224",
    {"timm_pool": "map", "timm_proj": None, "image_size": [40, 32]},
    WORDS,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config without a model, its shards, and a folder of OpenCLIP's for each model."""
    folder = tmp_path_factory.mktemp("world")
    config = yaml.safe_load(make_world(folder).read_text())
    del config["model"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for seed, (name, model) in enumerate({"clip": MODEL, "siglip": SIGLIP, "pe": PE_CORE}.items()):
        reference.make_checkpoint(model, seed, folder / name)
    return folder


def train(world: Path, name: str, *arguments: str, processes: int = 1) -> tuple[Path, str]:
    """The run folder, and what was printed."""
    said = succeed(
        "train", world / "config.yaml", f"run_dir={world}/{name}", *STILL, *arguments,
        processes=processes,
    )  # fmt: skip
    return world / name, said


def read_sizes(run_dir: Path) -> tuple:
    model = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
    return model["image_size"], model["context_length"]


def open_clips(folder: Path, image_size, context_length: int | None = None) -> torch.nn.Module:
    """open_clip's model of a folder at another size, as its trainer makes it. A trunk of timm is
    cut down to what the model config says, at the old size, as if that were the one so named."""
    model = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    described = folder.parent / f"of_{folder.name}.json"
    described.write_text(json.dumps(model))
    open_clip.add_model_config(described)
    create = timm.create_model
    if "timm_model_name" in model["vision_cfg"]:
        create = functools.partial(create, **reference.timm_arguments(model["vision_cfg"]))
    with mock.patch.object(open_clip.timm_model.timm, "create_model", create):
        return open_clip.create_model(
            described.stem,
            pretrained=str(folder / "open_clip_model.safetensors"),
            force_image_size=image_size,
            force_context_length=context_length,
        ).eval()


def assert_same_features(
    checkpoint: Path, of_pictures: torch.nn.Module, of_texts: torch.nn.Module
) -> None:
    encoder = load_encoder(checkpoint)
    config = encoder.architecture.json
    images, tokens = image_batch(config, 5), token_batch(config, 5)
    with torch.no_grad():
        pictures = of_pictures.encode_image(images, normalize=True)
        texts = of_texts.encode_text(tokens, normalize=True)
    assert distance(encoder.encode_image(images), pictures) < 1e-6
    assert distance(encoder.encode_text(tokens), texts) < 1e-6


def test_a_larger_picture_and_a_longer_text_on_four_processes(world):
    start = [f"init.from={world}/clip", "model.image_size=[48, 56]", "model.context_length=21"]
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]
    told = [
        "vision positions interpolated from 4 x 4 to 6 x 7 (bicubic, antialias, as OpenCLIP)",
        "text positions interpolated from 16 to 21 (linear, as OpenCLIP)",
        "preprocessing: 48 x 56 pixels",
    ]
    _, dry = train(world, "run", *start, "--dry-run")
    folder, said = train(world, "run", *start, *layout, processes=4)
    assert all(line in printed for line in told for printed in (dry, said))
    theirs = open_clips(world / "clip", (48, 56), 21)
    assert_same_features(folder, theirs, theirs)

    succeed("convert", folder, world / "back", "--to", "openclip")
    back = open_clip.create_model(f"local-dir:{world}/back")
    assert [*back.visual.image_size] == [48, 56] and back.context_length == 21
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in back.state_dict().items())

    # It goes on in another layout where the weights that it began with are gone.
    (world / "clip").rename(world / "gone")
    try:
        _, said = train(world, "run", *start, "train.steps=2")
        assert "interpolated" not in said and "goes on from" in said
        other = ["train", world / "config.yaml", f"run_dir={folder}", *STILL, "model.image_size=48"]
        ended = run(*other, start[0])[0]
        assert ended.code == 2 and "model.image_size: [48, 56] → 48" in ended.err
        _, said = train(world, "run", "train.steps=3", "resume.allow=[init]")
        assert "48 x 56" in said, "sizes that are left out with the name are the run's own"
        assert read_sizes(folder) == ([48, 56], 21)
    finally:
        (world / "gone").rename(world / "clip")
    assert_same_features(folder, theirs, theirs)


def test_siglip_at_another_size(world):
    start = [f"init.from={world}/siglip", "model.image_size=[56, 40]", "loss.kind=sigmoid"]
    folder, said = train(world, "siglip run", *start)
    assert "from 4 x 4 to 7 x 5 (bicubic, antialias, as timm)" in said
    theirs = open_clips(world / "siglip", (56, 40))
    assert_same_features(folder, theirs, theirs)


def test_towers_of_two_checkpoints_one_of_them_pe_core_at_another_size(world):
    model = PE_CORE | {"text_cfg": MODEL["text_cfg"], "embed_dim": MODEL["embed_dim"]}
    (world / "both.json").write_text(json.dumps(model))
    start = [f"model.name={world}/both.json", f"init.text={world}/clip"]
    start += [f"init.vision={world}/pe", "model.image_size=56"]
    ended = run("train", world / "config.yaml", f"run_dir={world}/none", *STILL, *start)[0]
    assert ended.code == 2 and not (world / "none").exists() and "Traceback" not in ended.err
    assert "of 24 numbers" in ended.err and "of both of 16" in ended.err
    assert "init.projection=new" in ended.err

    folder, said = train(world, "both", *start, "init.projection=new")
    assert f"{world}/pe (vision tower), {world}/clip (text tower); random: logit param" in said
    assert "5 x 4 to 7 x 7 (bicubic, antialias, as timm); rotary ones computed for 7 x 7" in said
    assert f"tokenizer: as init.text {world}/clip has it" in said
    pictures = open_clips(world / "pe", 56)
    head = load_encoder(folder).chunks[0].vision.projection
    pictures.visual.trunk.head = torch.nn.Linear(48, 16)
    pictures.visual.trunk.head.load_state_dict(head.state_dict())
    assert_same_features(folder, pictures, open_clips(world / "clip", 32))
    assert not head.bias.detach().any(), "as timm begins"


@pytest.mark.parametrize("key", ["vision", "text"])
def test_damage_is_found_before_anything_is_written(world, key, tmp_path):
    succeed("convert", world / "clip", tmp_path / "x", "--to", "run")
    file = next((tmp_path / "x/checkpoints").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    start = [f"init.{key}={tmp_path}/x", f"model.name={world}/model.json"]
    for ended in run(
        "train", world / "config.yaml", f"run_dir={tmp_path}/run", *STILL, *start, processes=2
    ):
        assert ended.code == 2 and "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()
