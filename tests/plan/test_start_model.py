"""Which model a run trains, and from which weights."""

import json

import pytest
import yaml

from parallel_clip.config import config_from_dict, resume_differences
from parallel_clip.convert.open import convert_checkpoint
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.plan.resume import ResumePoint, find_resume_point
from parallel_clip.plan.run_plan import make_run_plan
from parallel_clip.plan.start_model import check_trainable, find_start_model
from tests import reference
from tests.plan.small_plans import small_config
from tests.small_models import KINDS, small_model

MODEL = small_model(text={"vocab_size": 49408})


def test_what_is_drawn_at_random_in_training_is_refused_unless_it_is_overridden(tmp_path):
    model = KINDS["timm-mobile-clip"]
    vision = model["vision_cfg"] | {"timm_drop_path": 0.1}
    text = model["text_cfg"] | {"vocab_size": 49408}
    config = small_config(tmp_path, 1, model=model | {"vision_cfg": vision, "text_cfg": text})
    with pytest.raises(InputError, match=r"stochastic depth.*model.override=\[timm_drop_path\]"):
        make_run_plan(config, 1)
    named = config.model.model_copy(update={"override": ["timm_drop_path"]})
    plan, _ = make_run_plan(config.model_copy(update={"model": named}), 1)
    assert plan.architecture.vision.drop_path == 0.1, "as the JSON has it"


def test_known_models_without_it_are_trainable():
    with pytest.raises(InputError, match="timm_drop_path 0.1"):
        check_trainable(load_architecture("MobileCLIP2-L-14"), [])
    for name in ("MobileCLIP2-L-14", "ViT-B-16-SigLIP", "ViT-B-32"):
        check_trainable(load_architecture(name), ["vision_cfg.timm_drop_path"])


# ------------------------------------------------------------------------ from other weights


NEW = ResumePoint()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of OpenCLIP's: `one` and `other` of one model, `mean` with pictures otherwise
    prepared, `gelu` of another activation, `bare` that says nothing."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("one", "other", "mean", "bare")):
        reference.make_checkpoint(MODEL, seed, folder / name)
    reference.make_checkpoint(MODEL | {"quick_gelu": True}, 5, folder / "gelu")
    described = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.1] * 3}}
    (folder / "mean/open_clip_config.json").write_text(json.dumps(described))
    (folder / "bare/open_clip_config.json").unlink()
    return folder


def config_of(world, *overrides, loss="infonce"):
    """Nothing is read but `model` and `init`."""
    tree = {"train": {"steps": 1}, "data": {"train": [{"shards": "x.tar"}]}, "loss": {"kind": loss}}
    for override in overrides:
        key, value = override.split("=")
        section, key = key.split(".")
        tree.setdefault(section, {})[key] = yaml.safe_load(value.replace("@", f"{world}/"))
    return config_from_dict(tree | {"run_dir": f"{world}/run"})


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_sizes_change_the_model_that_is_named_or_started_from(world, loss):
    start = find_start_model(
        config_of(
            world,
            "init.from=@one",
            "model.image_size=[24, 40]",
            "model.context_length=20",
            loss=loss,
        ),
        NEW,
    )
    assert start.config.model.name == f"{world}/run/model.json"
    assert start.architecture.json["vision_cfg"]["image_size"] == [24, 40]
    assert start.architecture.json["text_cfg"]["context_length"] == 20
    assert (start.architecture.init_logit_bias is None) == (loss == "infonce")
    assert [note.split(" (")[0] for note in start.notes] == [
        "vision positions interpolated from 4 x 4 to 3 x 5",
        "text positions interpolated from 13 to 20",
    ]
    start = find_start_model(config_of(world, "model.name=ViT-L-14", "model.image_size=336"), NEW)
    assert start.architecture == load_architecture("ViT-L-14-336")
    assert (start.config.model.name, start.architecture.name) == ("ViT-L-14", "ViT-L-14-336")
    assert start.initial is None and start.notes == ()
    start = find_start_model(config_of(world, "model.image_size=280"), NEW)
    assert start.architecture == load_architecture("ViT-L-14-280"), "of the default"
    with pytest.raises(InputError, match="a picture has no whole patch"):
        find_start_model(config_of(world, "model.image_size=8"), NEW)


def test_a_model_of_another_size_may_be_named(world):
    other = small_model({"image_size": 48}, {"context_length": 20, "vocab_size": 49408})
    (world / "other.json").write_text(json.dumps(other))
    start = find_start_model(config_of(world, "init.from=@one", "model.name=@other.json"), NEW)
    assert start.config.model.name == f"{world}/other.json" and len(start.notes) == 2
    with pytest.raises(InputError, match=r"quick_gelu is True.*model.override=\[quick_gelu\] says"):
        find_start_model(config_of(world, "init.from=@gelu", "model.name=@other.json"), NEW)
    meant = ["init.from=@gelu", "model.name=@other.json", "model.override=[quick_gelu]"]
    assert not find_start_model(config_of(world, *meant), NEW).architecture.json.get("quick_gelu")


def test_which_model_towers_of_two_checkpoints_make(world):
    start = find_start_model(config_of(world, "init.vision=@one", "init.text=@other"), NEW)
    assert start.architecture == architecture_from_json(MODEL, "x")
    said = str(start.initial)
    assert said == (
        f"{world}/one (vision tower), {world}/other (text tower); random: logit parameters"
    )
    for wrong, told in {
        ("init.vision=@one",): "init.vision .*/one is of one",
        ("init.vision=@one", "init.text=@gelu"): "one is of one, init.text .*gelu is of gelu",
        ("init.vision=@one", "init.text=@bare"): "bare.* does not say of which it is",
    }.items():
        with pytest.raises(InputError, match=rf"model.name has to name .*{told}"):
            find_start_model(config_of(world, *wrong), NEW)
    with pytest.raises(InputError, match=r"init.from .*/one has another text tower than .*gelu"):
        find_start_model(config_of(world, "init.from=@one", "init.text=@gelu"), NEW)
    meant = ["init.from=@one", "init.text=@gelu", "model.override=[quick_gelu]"]
    start = find_start_model(config_of(world, *meant), NEW)
    assert str(start.initial) == (
        f"{world}/one (vision tower and logit parameters), {world}/gelu (text tower)"
    )
    with pytest.raises(InputError, match="model.override=quick_gelu is for a model.name"):
        find_start_model(config_of(world, "init.from=@one", "model.override=[quick_gelu]"), NEW)


def test_preprocessing_is_the_image_towers_and_the_tokenizer_the_texts(world):
    start = find_start_model(
        config_of(world, "init.from=@one", "init.vision=@mean", "init.text=@other"), NEW
    )
    assert start.preprocess[-1] == (f"{world}/mean/open_clip_config.json", {"mean": [0.1] * 3})
    assert start.tokenizer_from.folder == world / "other"
    assert start.notes == (f"tokenizer: as init.text {world}/other has it",)
    start = find_start_model(config_of(world, "init.from=@one", "init.text=@mean"), NEW)
    assert start.preprocess[-1][0] == f"{world}/one/open_clip_config.json"
    (world / "model.json").write_text(json.dumps(MODEL))
    start = find_start_model(config_of(world, "model.name=@model.json", "init.text=@mean"), NEW)
    assert start.preprocess == ((f"{world}/model.json", None),)
    start = find_start_model(config_of(world, "model.name=@model.json", "init.vision=@mean"), NEW)
    assert start.tokenizer_from is None


@pytest.mark.parametrize("key", ["from", "vision", "text"])
def test_what_is_no_checkpoint_is_told(world, key):
    (world / "model.json").write_text(json.dumps(MODEL))
    (world / "empty").mkdir(exist_ok=True)
    for path, told in (("nowhere", "does not exist"), ("empty", "holds no checkpoint")):
        with pytest.raises(InputError, match=told):
            find_start_model(config_of(world, "model.name=@model.json", f"init.{key}=@{path}"), NEW)


def test_stochastic_depth_of_a_checkpoint_can_be_left_out_without_naming_its_model(tmp_path):
    model = KINDS["timm-mobile-clip"]
    drops = model | {"vision_cfg": model["vision_cfg"] | {"timm_drop_path": 0.1}}
    reference.make_checkpoint(model, 1, tmp_path / "x")
    (tmp_path / "x/open_clip_config.json").write_text(json.dumps({"model_cfg": drops}))
    meant = ["init.from=@x", "model.override=[timm_drop_path]"]
    start = find_start_model(config_of(tmp_path, *meant), NEW)
    check_trainable(start.architecture, start.config.model.override)


# ------------------------------------------------------------------------ runs that go on


def test_a_converted_run_keeps_its_model(world):
    run = world / "run of one"
    convert_checkpoint(world / "one", run, "run")

    def plan(*overrides):
        config = config_of(world, *overrides).model_copy(update={"run_dir": str(run)})
        return find_start_model(config, find_resume_point(config))

    assert plan("model.image_size=32").architecture == architecture_from_json(MODEL, "x")
    with pytest.raises(InputError, match=r"image_size is \[32, 32\] .*begins with init.from"):
        plan("model.image_size=48")
    with pytest.raises(InputError, match="converted checkpoint to train, and init.from would"):
        plan("init.from=@other")
    large = small_model({"image_size": 48}, {"vocab_size": 49408})
    (world / "large.json").write_text(json.dumps(large))
    plan("model.name=@large.json", "model.image_size=32")
    with pytest.raises(InputError, match="image_size"):
        plan("model.name=@large.json")


def test_sizes_and_beginnings_are_compared_on_resuming(world):
    saved = config_of(world, "init.from=@one", "model.image_size=48", "model.name=x.json")

    def differing(*overrides):
        new = config_of(world, *overrides)
        return resume_differences(saved, new).refused

    same = ["init.from=@one", "model.image_size=48", "model.name=x.json"]
    assert differing(*same) == []
    assert differing(*same, "init.vision=@mean") == [f'init.vision: null → "{world}/mean"']
    assert differing(*same[1:]) == [f'init.from: "{world}/one" → null']
    assert differing(*same[1:], "resume.allow=[init]") == []
    assert differing(*same[:1], *same[2:]) == ["model.image_size: 48 → null"]
    with pytest.raises(InputError, match="resume.allow names 'model.image_size'"):
        differing(*same, "resume.allow=[model.image_size]")
    with pytest.raises(InputError, match="init.projection new is for weights of init.from"):
        config_of(world, "init.projection=new")
