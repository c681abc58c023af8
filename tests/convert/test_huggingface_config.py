"""config.json of transformers to OpenCLIP's model config and back."""

import json

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from parallel_clip.convert.huggingface_config import openclip_model
from parallel_clip.convert.huggingface_config_writer import huggingface_config
from parallel_clip.convert.huggingface_defaults import (
    ACTIVATIONS,
    CLIP_DEFAULTS,
    SIGLIP_DEFAULTS,
)
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import known_name, load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from tests.convert.huggingface_models import CONFIGS, clip_config, siglip_config
from tests.convert.test_huggingface_names import EXPRESSIBLE
from tests.small_models import KINDS, small_model


def read(config: dict):
    return architecture_from_json(openclip_model(config, "config.json")[0], "small")


@pytest.mark.parametrize(
    "defaults, config",
    [
        (CLIP_DEFAULTS, transformers.CLIPConfig()),
        (SIGLIP_DEFAULTS, transformers.SiglipConfig()),
    ],
)
def test_defaults_are_those_of_transformers(defaults, config):
    theirs = config.to_dict()
    for key, value in defaults.items():
        if isinstance(value, dict):
            assert value == {name: theirs[key][name] for name in value}
        else:
            assert value == theirs[key]


@pytest.mark.parametrize("ours", ACTIVATIONS)
def test_activations_are_one_function(ours):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    functions = {
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    for theirs in ACTIVATIONS[ours]:
        torch.testing.assert_close(ACT2FN[theirs](x), functions[ours](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_known_model_comes_back(name):
    """But for its tokenizer, of which config.json says nothing, and what training begins with."""
    architecture = load_architecture(name)
    config = json.loads(json.dumps(huggingface_config(architecture, "float32")))
    found = read(config)
    expected = architecture.settings()
    for key in ("text_cfg.hf_tokenizer_name", "text_cfg.tokenizer_kwargs"):
        expected[key] = {} if key.endswith("kwargs") else None
    assert found.settings() == expected
    assert huggingface_config(found, "float32") == config
    if "worldwide" not in name and "SigLIP" not in name:
        assert load_architecture(known_name(found)) == architecture


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back(name):
    config = CONFIGS[name]
    written = huggingface_config(read(config), "float32")
    for section in ("text_config", "vision_config"):
        for key, value in config[section].items():
            assert written[section][key] == value, key


# ---------------------------------------------------------------- what a config.json leaves out


def test_what_is_left_out_is_as_transformers_takes_it_and_said():
    bare = {"model_type": "clip", "text_config": {"num_hidden_layers": 3}}
    model, left_out = openclip_model(bare, "config.json")
    whole = transformers.CLIPConfig(**bare).to_dict()
    assert architecture_from_json(model, "small") == read(whole)
    assert "projection_dim" in left_out and "text_config.hidden_act" in left_out
    assert "text_config.num_hidden_layers" not in left_out
    assert openclip_model(whole, "config.json")[1] == []


@pytest.mark.parametrize("legacy", [None, {"hidden_size": 64, "num_attention_heads": 2}])
def test_the_old_keys_overrule_as_in_transformers(legacy):
    """OpenAI's own files of 2022 have each section twice."""
    config = clip_config({"hidden_act": "gelu"}, {"hidden_act": "gelu"})
    config |= {"text_config_dict": legacy, "vision_config_dict": legacy}
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(config))).to_dict()
    assert read(config) == read(theirs)


# ---------------------------------------------------------------------------------- the refused

OTHERS = {
    "a BERT": (transformers.BertConfig().to_dict(), "model_type 'bert'.*CLIPModel and SiglipModel"),
    "an image tower": (
        transformers.CLIPVisionConfig().to_dict(),
        "clip_vision_model.*one tower alone",
    ),
    "SigLIP's image tower": (
        transformers.SiglipVisionConfig().to_dict(),
        "siglip_vision_model.*one tower alone",
    ),
    "CLIPSeg": (transformers.CLIPSegConfig().to_dict(), "model_type 'clipseg'"),
    "NaFlex": (transformers.Siglip2Config().to_dict(), "siglip2.*any size .NaFlex."),
    "a classifier": (
        clip_config() | {"architectures": ["CLIPForImageClassification"]},
        "of a CLIPForImageClassification.*a CLIPModel is near",
    ),
    "no model": ({"hidden_size": 3}, "of no model that it names"),
    "a list": (clip_config() | {"text_config": [1]}, "text_config must be a JSON object"),
    "an old list": (
        clip_config() | {"text_config_dict": [1]},
        r"text_config_dict must be a JSON object, not \[1\]",
    ),
    "a list of types": (clip_config() | {"model_type": ["clip"]}, r"model_type \['clip'\]"),
    "classes that are no list": (
        clip_config() | {"architectures": {"CLIPModel": 1}},
        "architectures must be a list of classes",
    ),
    "a list of activations": (
        clip_config({"hidden_act": ["gelu"]}),
        r"text_config.hidden_act = \['gelu'\]",
    ),
    "a number beyond all": (
        clip_config() | {"logit_scale_init_value": 10**400},
        "logit_scale_init_value must be a number",
    ),
    "one QuickGELU": (
        clip_config(vision={"hidden_act": "gelu"}),
        "vision_config.hidden_act is gelu .*text_config.hidden_act quick_gelu",
    ),
    "an activation": (clip_config({"hidden_act": "relu"}), "text_config.hidden_act = 'relu'"),
    "grey pictures": (clip_config(vision={"num_channels": 1}), "num_channels must be 3"),
    "heads": (clip_config({"num_attention_heads": 5}), "32 is not divisible by the 5"),
    "several ends": (clip_config({"eos_token_id": [1, 2]}), r"eos_token_id .* not \[1, 2\]"),
    "no end": (clip_config({"eos_token_id": None}), "eos_token_id .* not None"),
    "oblong": (clip_config(vision={"image_size": [32, 16]}), "image_size must be a whole number"),
    "no head": (siglip_config(vision={"vision_use_head": False}), "vision_use_head must be true"),
    "two widths": (siglip_config({"projection_size": 40}), "projection_size 40 must be .* 48"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_refused_says_why_and_what_is_near(kind):
    config, told = OTHERS[kind]
    with pytest.raises(InputError, match=f"(?s){told}"):
        openclip_model(json.loads(json.dumps(config)), "config.json")


SIGLIP = KINDS["timm-siglip"]
UNSPEAKABLE = {
    "a mean of patches": (small_model({"pool_type": "avg"}), "pool_type is 'avg'"),
    "no first norm": (small_model({"no_ln_pre": True}), "no_ln_pre is on"),
    "LayerScale": (small_model(text={"ls_init_value": 0.1}), "text_cfg.ls_init_value"),
    "oblong": (small_model({"image_size": [32, 16]}), r"image_size is \[32, 16\]"),
    "no mask": (small_model(text={"no_causal_mask": True}), "no_causal_mask is on"),
    "a bias": (small_model(text={"proj_bias": True}), "projection has a bias"),
    "the last token": (small_model(text={"pool_type": "last"}), "pool_type is 'last'"),
    "an end that is 2": (
        small_model(text={"pool_type": "eos", "eos_id": 2}),
        "eos_id is 2, which means pool_type 'argmax'",
    ),
    "cleaning": (
        small_model(text={"tokenizer_kwargs": {"clean": "whitespace"}}),
        "clean is 'whitespace', and CLIP's own tokenizer has 'lower'",
    ),
    "an option of the tokenizer": (
        small_model(text={"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"language": "de"}}),
        "tokenizer_kwargs has language",
    ),
    "a projection of pictures": (KINDS["timm-linear"], "timm_proj is not 'none'"),
    "PE-Core": (KINDS["timm-pe-core"], "vit_pe_core_base_patch16_224 is no trunk of SigLIP's"),
    "no text projection": (KINDS["timm-siglip-i18n"], "proj_bias is off"),
    "no bias of the logits": (
        {k: v for k, v in SIGLIP.items() if k != "init_logit_bias"},
        "it has no logit_bias",
    ),
    "a causal SigLIP": (
        SIGLIP | {"text_cfg": SIGLIP["text_cfg"] | {"no_causal_mask": False}},
        "no_causal_mask is off",
    ),
}


@pytest.mark.parametrize("kind", UNSPEAKABLE)
def test_what_transformers_cannot_be_told_is_named(kind):
    model, told = UNSPEAKABLE[kind]
    with pytest.raises(InputError, match=f"cannot be written as a .*{told}.*--to openclip keeps"):
        huggingface_config(architecture_from_json(model, "small"), "float32")
