"""Our table and reading of model configs against OpenCLIP's own files and dataclasses."""

import json
import math
import re
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
from open_clip.transform import PreprocessCfg

from parallel_clip.errors import InputError
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import known_names, load_architecture, load_model
from parallel_clip.model.openclip_json import (
    MODEL_KEYS,
    TEXT_KEYS,
    VISION_KEYS,
    architecture_from_json,
)
from parallel_clip.model.timm_json import TIMM_VISION_KEYS
from tests.reference import build_model

KEYS = {"model": MODEL_KEYS, "vision_cfg": VISION_KEYS, "text_cfg": TEXT_KEYS}

open_clip = pytest.importorskip("open_clip")
CONFIG_FILES = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def is_plain(config: dict) -> bool:
    """A plain ViT with OpenCLIP's own text transformer, told without any of our code."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return (
        "multimodal_cfg" not in config
        and not vision.get("timm_model_name")
        and isinstance(vision["layers"], int)
        and not text.get("hf_model_name")
    )


def has_timm_vit(config: dict) -> bool:
    """SigLIP, SigLIP 2 at fixed sizes, PE-Core and MobileCLIP2-L, likewise."""
    trunk = config["vision_cfg"].get("timm_model_name") or ""
    of_kind = re.fullmatch(r"vit_(.*_siglip_\d+|pe_core_.*|large_patch14_clip_224)", trunk)
    return bool(of_kind) and not config["text_cfg"].get("hf_model_name")


PLAIN = [path for path in CONFIG_FILES if is_plain(read(path))]
TIMM = [path for path in CONFIG_FILES if has_timm_vit(read(path))]
OTHERS = [path for path in CONFIG_FILES if path not in [*PLAIN, *TIMM]]


SIGLIP = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"}


def small(vision: dict | None = None, text: dict | None = None, **model) -> dict:
    return {
        "embed_dim": 32,
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
        | {"image_size": 32}
        | (vision or {}),
        "text_cfg": {"layers": 2, "width": 64, "heads": 2} | (text or {}),
    } | model


def test_the_table_holds_every_model_that_is_built():
    assert (len(PLAIN), len(TIMM)) == (45, 32)
    assert sorted(known_names()) == sorted(path.stem for path in [*PLAIN, *TIMM])


@pytest.mark.parametrize("path", [*PLAIN, *TIMM], ids=lambda path: path.stem)
def test_known_model_is_openclips(path):
    known = load_architecture(path.stem)
    assert known.json == read(path)
    assert known.name == path.stem
    assert load_architecture(str(path)) == known


@pytest.mark.parametrize("path", [*PLAIN, *TIMM], ids=lambda path: path.stem)
def test_parameters_have_openclips_names_and_shapes(path):
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = build_model(read(path))
    ours = {p.name: p.shape for p in parameter_table(load_architecture(path.stem))}
    assert ours == {name: tuple(p.shape) for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("path", [*PLAIN, *TIMM], ids=lambda path: path.stem)
def test_preprocessing_of_a_name_is_that_of_all_its_weights(path):
    """Where OpenCLIP's weights of a name differ, or it has none, nothing is assumed."""
    said = open_clip.pretrained._PRETRAINED.get(path.stem, {}).values()
    keys = "mean", "std", "interpolation", "resize_mode"
    theirs = [PreprocessCfg(**{k: cfg[k] for k in keys if cfg.get(k)}) for cfg in said]
    ours = PreprocessCfg(**(load_model(path.stem).preprocess or {}))
    if theirs and theirs.count(theirs[0]) == len(theirs):
        assert [list(getattr(ours, k)) for k in keys] == [list(getattr(theirs[0], k)) for k in keys]
    else:
        assert load_model(path.stem).preprocess is None


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_known_model_has_openclips_shapes(path):
    """The towers that OpenCLIP builds on the meta device, cut down to two layers."""
    torch = pytest.importorskip("torch")
    config = read(path)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    ours = architecture_from_json(config, path.stem)
    with torch.device("meta"):
        theirs = open_clip.CLIP(**config)
    image_block = theirs.visual.transformer.resblocks[0]
    text_block = theirs.transformer.resblocks[0]
    vision, text = ours.vision, ours.text

    assert image_block.attn.num_heads == vision.heads
    assert image_block.attn.head_dim == vision.head_width
    assert image_block.mlp.c_fc.out_features == vision.mlp_width
    assert image_block.ln_1.eps == vision.norm_eps
    assert hasattr(image_block.ls_1, "gamma") == (vision.layer_scale is not None)
    assert theirs.visual.grid_size == vision.grid
    assert theirs.visual.positional_embedding.shape == (vision.tokens, vision.width)
    assert theirs.visual.pool_type == vision.pool
    assert theirs.visual.final_ln_after_pool == vision.final_norm_after_pool
    assert isinstance(theirs.visual.ln_pre, torch.nn.LayerNorm) == vision.pre_norm
    assert theirs.visual.proj.shape == (vision.width, ours.embed_dim)

    assert text_block.attn.num_heads == text.heads
    assert text_block.mlp.c_fc.out_features == text.mlp_width
    assert theirs.token_embedding.weight.shape == (text.vocab_size, text.width)
    assert theirs.positional_embedding.shape == (text.context_length, text.width)
    assert (theirs.attn_mask is not None) == text.causal
    assert (theirs.text_pool_type, theirs.text_eos_id) == (text.pool, text.eos_id)
    assert (type(text_block.mlp.gelu).__name__ == "QuickGELU") == (text.activation == "quick_gelu")


def test_defaults_are_openclips():
    vision, text = open_clip.CLIPVisionCfg(), open_clip.CLIPTextCfg()
    ours = architecture_from_json({"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}, "defaults")
    assert ours.vision.width == vision.width
    assert ours.vision.layers == vision.layers
    assert ours.vision.heads == vision.width // vision.head_width
    assert ours.vision.mlp_width == int(vision.width * vision.mlp_ratio)
    assert ours.vision.image_size == (vision.image_size,) * 2
    assert ours.vision.patch_size == (vision.patch_size,) * 2
    assert ours.vision.pool == vision.pool_type
    assert ours.text.width == text.width
    assert ours.text.layers == text.layers
    assert ours.text.heads == text.heads
    assert ours.text.mlp_width == int(text.width * text.mlp_ratio)
    assert ours.text.context_length == text.context_length
    assert ours.text.vocab_size == text.vocab_size
    assert (ours.text.pool, ours.text.eos_id) == (text.pool_type, text.eos_id)
    assert ours == architecture_from_json(
        {
            "embed_dim": 512,
            "vision_cfg": {f.name: getattr(vision, f.name) for f in fields(vision)},
            "text_cfg": {
                f.name: getattr(text, f.name) for f in fields(text) if f.name != "hf_model_name"
            },
        },
        "defaults written out",
    )


@pytest.mark.parametrize(
    ("theirs", "keys"),
    [
        (open_clip.CLIPVisionCfg, VISION_KEYS),
        (open_clip.CLIPVisionCfg, TIMM_VISION_KEYS),
        (open_clip.CLIPTextCfg, TEXT_KEYS),
    ],
    ids=["vision_cfg", "vision_cfg of timm", "text_cfg"],
)
def test_every_key_of_openclip_is_accounted_for(theirs, keys):
    """Read here, refused by name, or without effect: each key exactly once."""
    ours = [*keys.read, *keys.unsupported, *keys.without_effect]
    assert sorted(ours) == sorted(f.name for f in fields(theirs))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_other_openclip_models_are_refused_by_a_switch(path):
    switches = ("timm_model_name", "hf_model_name", "multimodal_cfg", "vision_cfg.layers")
    with pytest.raises(InputError) as error:
        load_architecture(str(path))
    assert any(switch in str(error.value) for switch in switches)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, keys in KEYS.items() for name in keys.unsupported],
)
def test_each_unsupported_switch_is_refused_by_name(kind, name):
    config = small()
    target = config if kind == "model" else config[kind]
    for off in (None, False, "", KEYS[kind].off_values.get(name)):
        if name != "hf_model_name":  # its mere presence changes the names of the parameters
            target[name] = off
            assert architecture_from_json(config, "off") == architecture_from_json(small(), "")
    target[name] = "custom"
    with pytest.raises(InputError, match=name):
        architecture_from_json(config, "on")


def test_switches_are_read():
    ours = architecture_from_json(
        small(
            vision={
                "image_size": [40, 31],
                "patch_size": [8, 10],
                "mlp_ratio": 4.3637,
                "ls_init_value": 0.1,
                "patch_dropout": 0.5,
                "act_kwargs": {"approximate": "tanh"},
                "norm_kwargs": {"eps": 1e-6},
            },
            text={"proj_bias": True, "pool_type": "first", "no_causal_mask": True},
            custom_text=True,
            init_logit_scale=2.0,
            init_logit_bias=-10,
        ),
        "switches",
    )
    assert ours.vision.grid == (5, 3)
    assert (ours.vision.patches, ours.vision.tokens, ours.vision.patches_kept) == (15, 16, 7)
    assert ours.vision.mlp_width == 279
    assert (ours.vision.layer_scale, ours.text.layer_scale) == (0.1, None)
    assert (ours.vision.activation, ours.text.activation) == ("gelu_tanh", "gelu")
    assert (ours.vision.norm_eps, ours.text.norm_eps) == (1e-6, 1e-5)
    assert (ours.text.projection, ours.text.pool, ours.text.causal) == ("linear", "first", False)
    assert (ours.custom_text, ours.init_logit_scale, ours.init_logit_bias) == (True, 2.0, -10.0)


def test_quick_gelu_is_for_both_towers():
    ours = architecture_from_json(small(quick_gelu=True), "quick")
    assert ours.vision.activation == ours.text.activation == "quick_gelu"


def test_presence_of_hf_model_name_chooses_custom_text_names():
    assert architecture_from_json(small(text={"hf_model_name": None}), "null").custom_text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(vision={"widht": 64}), "vision_cfg.widht.*nearest known is width"),
        (small(text={"head": 2}), "text_cfg.head.*nearest known is heads"),
        (small(quickgelu=True), "quickgelu.*nearest known is quick_gelu"),
        ({"embed_dim": 32, "vision_cfg": {}}, "text_cfg is missing"),
        (small(vision={"width": 100}), "width 100 .*head_width 32"),
        (small(vision={"head_width": 128}), "width 64 .*head_width 128"),
        (small(text={"heads": 3}), "width 64 is not divisible by text_cfg.heads 3"),
        (small(vision={"layers": "2"}), "vision_cfg.layers must be a whole number"),
        (small(vision={"layers": True}), "vision_cfg.layers must be a whole number"),
        (small(vision={"layers": 0}), "vision_cfg.layers must be .* at least 1"),
        (small(embed_dim=None), "embed_dim must be a whole number"),
        (small(vision={"image_size": [32, 32, 3]}), "image_size must be"),
        (small(vision={"image_size": 7}), "patch_size .* larger than"),
        (small(vision={"patch_dropout": 1.0}), "patch_dropout 1.0"),
        (small(vision={"mlp_ratio": float("nan")}), "mlp_ratio must be a number"),
        (small(vision={"pool_type": "none"}), "pool_type = 'none' .* tok, avg"),
        (small(vision={"pos_embed_type": "sin_cos_2d"}), "pos_embed_type = 'sin_cos_2d'"),
        (small(vision={"no_ln_pre": 1}), "no_ln_pre must be true or false"),
        (small(vision={"norm_kwargs": {"bias": False}}), "norm_kwargs.bias"),
        (small(vision={"norm_kwargs": {"eps": "x"}}), "norm_kwargs.eps"),
        (small(vision={"act_kwargs": {"approximate": "x"}}), "act_kwargs.approximate"),
        (small(vision={"act_kwargs": {"approximate": "tanh"}}, quick_gelu=True), "quick_gelu"),
        (small(text={"pool_type": "eos", "eos_id": 49408}), "eos_id 49408"),
        (small(text={"hf_tokenizer_name": 3}), "hf_tokenizer_name must be a text"),
        (small(vision={"pool_type": ["tok"]}), r"pool_type = \['tok'\] is not supported"),
        (small(text={"proj_type": {}}), "proj_type = {} is not supported"),
        (small(vision=SIGLIP | {"timm_proj": []}), r"timm_proj = \[\] is not supported"),
        (small(vision=SIGLIP | {"timm_pool": {}}), "timm_pool = {} is not supported"),
        (small(init_logit_scale=10**400), "init_logit_scale must be a number"),
        ([], "must be a JSON object"),
        ({"embed_dim": 32, "vision_cfg": [], "text_cfg": {}}, "vision_cfg must be a JSON object"),
    ],
)
def test_wrong_configs_are_named(config, message):
    with pytest.raises(InputError, match=message):
        architecture_from_json(config, "wrong")


def test_files_of_both_forms(tmp_path):
    plain = tmp_path / "mine.json"
    plain.write_text(json.dumps(small()))
    folder = tmp_path / "my-run"
    folder.mkdir()
    nested = folder / "open_clip_config.json"
    nested.write_text(json.dumps({"model_cfg": small(), "preprocess_cfg": {"size": 32}}))

    assert load_architecture(str(plain)).name == "mine"
    assert load_architecture(str(nested)).name == "my-run"
    assert load_architecture(str(nested)).json == small()
    assert load_architecture(str(nested)) == load_architecture(str(plain))


def test_sigmoid_gives_logit_defaults_before_what_the_json_says(tmp_path):
    """The order too: it is written to checkpoints."""
    plain, given = tmp_path / "plain.json", tmp_path / "given.json"
    plain.write_text(json.dumps(small()))
    config = {"output_dict": None, "init_logit_bias": None, **small(), "init_logit_scale": 2.0}
    given.write_text(json.dumps(config))

    ours = load_architecture(str(plain), "sigmoid")
    assert (ours.init_logit_scale, ours.init_logit_bias) == (math.log(10), -10.0)
    assert list(ours.json) == ["init_logit_scale", "init_logit_bias", *small()]
    ours = load_architecture(str(given), "sigmoid")
    assert (ours.init_logit_scale, ours.init_logit_bias) == (2.0, -10.0)
    assert list(ours.json) == ["init_logit_scale", "init_logit_bias", *small()]
    assert list(load_architecture(str(given), "infonce").json) == list(config)
    given.write_text(json.dumps(small() | {"no_such_key": None}))
    with pytest.raises(InputError, match="no_such_key"):
        load_architecture(str(given), "sigmoid")


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_architecture(str(tmp_path / "missing.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_architecture(str(tmp_path / "broken.json"))


def test_unknown_name_names_the_nearest():
    with pytest.raises(InputError, match="ViT-B-32"):
        load_architecture("vit-b32")
    assert load_architecture("ViT-B/32").name == "ViT-B-32"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("coca_ViT-L-14", "CoCa.*ViT-L-14"),
        ("EVA02-L-14-336", "EVA.*PE-Core-L-14-336"),
        ("MobileCLIP2-S3", "FastViT.*MobileCLIP2-L-14"),
        ("MobileCLIP2-B", "convolutional stem.*ViT-B-16"),
        ("ViT-SO400M-16-SigLIP2-naflex", "NaFlex.*SigLIP2"),
        ("HTSAT-tiny", "audio"),
        ("RN50x4", "ResNet"),
        ("nllb-clip-base-siglip", "Hugging Face.*i18n"),
        ("convnext_base", "ConvNeXt"),
    ],
)
def test_what_is_not_built_is_named_with_what_is_near(name, words):
    with pytest.raises(InputError, match=words):
        load_architecture(name)


def test_the_json_is_a_copy():
    config = small(text={"tokenizer_kwargs": {"clean": "lower"}})
    ours = architecture_from_json(config, "copy")
    before = deepcopy(ours.json)
    config["text_cfg"]["tokenizer_kwargs"]["clean"] = "changed"
    assert ours.json == before
    load_architecture("ViT-L-14-CLIPA").json["text_cfg"]["tokenizer_kwargs"].clear()
    assert load_architecture("ViT-L-14-CLIPA").json["text_cfg"]["tokenizer_kwargs"]
