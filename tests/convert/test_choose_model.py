"""Where two descriptions of one model meet: switches, preprocessing, tokenizers."""

import json

import pytest

from parallel_clip.convert.choose_model import ModelChoice, choose_model, resolve_preprocess
from parallel_clip.convert.open import open_source
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import known_name, load_architecture
from tests import reference
from tests.small_models import small_model

# Switches of equal shapes: the model of the checkpoint, the one that is named, what is told.
SWITCHES = {
    "quick_gelu": (small_model(quick_gelu=True), small_model(), "quick_gelu is True"),
    "quick_gelu off": (small_model(), small_model(quick_gelu=True), "quick_gelu is False"),
    "heads": (small_model(), small_model(text={"heads": 8}), "text_cfg.heads is 4"),
    "head width": (small_model(), small_model({"head_width": 24}), "vision_cfg.head_width is 12"),
    "pooling": (small_model(), small_model({"pool_type": "avg"}), "vision_cfg.pool_type is 'tok'"),
    "text pooling": (small_model(), small_model(text={"pool_type": "last"}), "text_cfg.pool_type"),
    "end of text": (
        small_model(text={"pool_type": "eos", "eos_id": 3}),
        small_model(text={"pool_type": "eos", "eos_id": 4}),
        "text_cfg.eos_id is 3",
    ),
    "mask": (small_model(), small_model(text={"no_causal_mask": True}), "text_cfg.no_causal_mask"),
    "norm after pooling": (
        small_model({"pool_type": "avg"}),
        small_model({"pool_type": "avg", "final_ln_after_pool": True}),
        "vision_cfg.final_ln_after_pool is False",
    ),
    "epsilon": (
        small_model({"norm_kwargs": {"eps": 1e-6}}),
        small_model(),
        "vision_cfg.norm_kwargs is {'eps': 1e-06}",
    ),
    "activation": (
        small_model(text={"act_kwargs": {"approximate": "tanh"}}),
        small_model(),
        "text_cfg.act_kwargs is {'approximate': 'tanh'}",
    ),
    "pixels of equal patches": (
        small_model({"image_size": 32}),
        small_model({"image_size": 36}),
        "vision_cfg.image_size is [32, 32]",
    ),
    "tokenizer": (
        small_model(),
        small_model(text={"hf_tokenizer_name": "bert-base-uncased"}),
        "text_cfg.hf_tokenizer_name is None",
    ),
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """Makes a checkpoint of a model, and a JSON file of another; returns both paths."""

    def make(own, named):
        reference.make_checkpoint(own, seed=1, folder=tmp_path / "checkpoint")
        (tmp_path / "named.json").write_text(json.dumps(named))
        return tmp_path / "checkpoint", str(tmp_path / "named.json")

    return make


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_of_equal_shapes_is_named_and_can_be_overridden(world, switch):
    own, named, told = SWITCHES[switch]
    checkpoint, name = world(own, named)
    source = open_source(checkpoint).metadata
    with pytest.raises(InputError) as caught:
        choose_model(ModelChoice(name), source)
    message = str(caught.value)
    assert told in message and "open_clip_config.json" in message
    key = told.split(" ")[0]
    assert f"--override {key}" in message
    for override in ([key], [key.rpartition(".")[2]]):
        chosen = choose_model(ModelChoice(name, override), source)
        assert chosen.architecture == load_architecture(name)
    with pytest.raises(InputError, match=key):
        choose_model(ModelChoice(name, ["mlp_ratio"]), source)
    with pytest.raises(InputError, match="names 'gelu'; there are"):
        choose_model(ModelChoice(name, ["gelu"]), source)


def test_several_differences_are_named_at_once(world):
    checkpoint, name = world(small_model(quick_gelu=True), small_model(text={"heads": 8}))
    source = open_source(checkpoint).metadata
    with pytest.raises(InputError, match=r"--override quick_gelu,text_cfg.heads says so"):
        choose_model(ModelChoice(name), source)
    with pytest.raises(InputError, match=r"heads is 4.*model.override=\[text_cfg.heads\]"):
        options = "model.name", "model.override="
        choose_model(ModelChoice(name, ["quick_gelu"], *options), source)


def test_other_shapes_are_not_to_be_overridden(world):
    checkpoint, name = world(small_model(), small_model(text={"context_length": 20}))
    with pytest.raises(InputError, match="context_length is 13 there and 20 here") as caught:
        choose_model(ModelChoice(name), open_source(checkpoint).metadata)
    assert "--override" not in str(caught.value)
    assert "a run that begins with init.from may have another size" in str(caught.value)


@pytest.mark.parametrize(
    "named",
    [
        small_model(custom_text=True),
        small_model({"patch_dropout": 0.5}),
        small_model(init_logit_scale=2.0, init_logit_bias=-10.0),
        small_model(output_dict=True, quick_gelu=False),
    ],
)
def test_what_changes_no_feature_may_differ(world, named):
    checkpoint, name = world(small_model(), named)
    chosen = choose_model(ModelChoice(name), open_source(checkpoint).metadata)
    assert chosen.architecture == load_architecture(name)


def test_a_tokenizer_that_is_chosen_overrules_what_either_names(world):
    own, named, _ = SWITCHES["tokenizer"]
    checkpoint, name = world(own, named)
    choose_model(ModelChoice(name, tokenizer_chosen=True), open_source(checkpoint).metadata)


def test_stochastic_depth_can_be_left_out_of_a_model_that_nobody_names(tmp_path):
    """It is no difference between two models, but what a run may do without."""
    reference.make_checkpoint(small_model(), seed=1, folder=tmp_path / "checkpoint")
    source = open_source(tmp_path / "checkpoint").metadata
    for override in (["timm_drop_path"], ["vision_cfg.timm_drop_path"]):
        assert choose_model(ModelChoice(None, override), source).architecture == source.architecture
    with pytest.raises(InputError, match="override quick_gelu is for"):
        choose_model(ModelChoice(None, ["timm_drop_path", "quick_gelu"]), source)


def test_a_model_that_nobody_names_is_asked_for(tmp_path):
    reference.make_checkpoint(small_model(), seed=1, folder=tmp_path / "checkpoint")
    (tmp_path / "checkpoint/open_clip_config.json").unlink()
    source = open_source(tmp_path / "checkpoint").metadata
    with pytest.raises(InputError, match="add model.name NAME"):
        choose_model(ModelChoice(name_option="model.name"), source)
    with pytest.raises(InputError, match="override quick_gelu is for a --model"):
        reference.make_checkpoint(small_model(), seed=1, folder=tmp_path / "whole")
        choose_model(ModelChoice(None, ["quick_gelu"]), open_source(tmp_path / "whole").metadata)


def test_preprocessing_of_a_named_file_ranks_below_the_checkpoints(world, tmp_path):
    checkpoint, _ = world(small_model(), small_model())
    named = tmp_path / "named"
    named.mkdir()
    settings = {"mean": [0.1] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
    (named / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": small_model(), "preprocess_cfg": settings})
    )
    name = str(named / "open_clip_config.json")
    source = open_source(checkpoint).metadata
    chosen = choose_model(ModelChoice(name), source)
    preprocess, words = resolve_preprocess((32, 32), chosen.preprocess)
    assert list(preprocess.mean) == reference.PREPROCESS["mean"]
    assert preprocess.resize_mode == "squash"  # which the checkpoint does not say
    assert words.endswith(f"(from {name}, overruled by {checkpoint}/open_clip_config.json)")

    (checkpoint / "open_clip_config.json").unlink()
    chosen = choose_model(ModelChoice(name), open_source(checkpoint).metadata)
    preprocess, words = resolve_preprocess((32, 32), chosen.preprocess)
    assert preprocess.mean == (0.1, 0.1, 0.1) and words.endswith(f"(from {name})")
    preprocess, words = resolve_preprocess((32, 32), [("x", None), ("y", {"mean": None})])
    assert words.endswith("(from OpenCLIP's defaults)")


def test_wrong_preprocessing_is_told_with_its_file():
    with pytest.raises(InputError, match=r"preprocess_cfg.std.*from a.json"):
        resolve_preprocess((32, 32), [("a.json", {"std": [0, 1, 1]})])


def test_known_names():
    assert known_name(load_architecture("ViT-B-32")) == "ViT-B-32"
    assert known_name(load_architecture("ViT-B-32", "sigmoid"), "sigmoid") == "ViT-B-32"
    assert known_name(load_architecture("ViT-L-14-quickgelu")) == "ViT-L-14-quickgelu"
