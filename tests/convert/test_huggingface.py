"""Folders of transformers in and out: equal features, the same bits, and what is refused."""

import json
import os
import shutil

import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline

from parallel_clip.convert import huggingface
from parallel_clip.convert.choose_model import ModelChoice
from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.data.samples.transforms import evaluation_transform
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import load_encoder
from tests import reference
from tests.convert.huggingface_models import CONFIGS, build, features, picture, save
from tests.convert.test_openclip import Malicious
from tests.data.samples.tokenizer_folders import make_unigram
from tests.small_models import KINDS, distance, image_batch, small_model, token_batch

WEIGHTS = "model.safetensors"
SIGLIP = {"timm_pool": "map", "timm_proj": "none"}


def inputs_of(architecture, count=3):
    """Pictures and tokens; each row has token 7, and the highest token, somewhere."""
    return image_batch(architecture.json, count), token_batch(architecture.json, count)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


def with_processor_and_tokenizer(folder):
    """A processor and a tokenizer beside a model, so that it is whole."""
    config = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False,
              "size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return make_unigram(folder)


# ------------------------------------------------------------------------------- equal features


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each config of transformers saved by it: name -> (folder, model)."""
    folder = tmp_path_factory.mktemp("saved")
    return {
        name: (with_processor_and_tokenizer(folder / name), model)
        for name, model in ((name, save(CONFIGS[name], folder / name)) for name in CONFIGS)
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_features_of_a_model_of_transformers(saved, tmp_path, name):
    """In our model and, where it can be told what the model is, in open_clip's."""
    folder, model = saved[name]
    encoder = load_encoder(folder)
    images, tokens = inputs_of(encoder.architecture)
    expected = features(model, images, tokens)
    found = encoder.encode_image(images), encoder.encode_text(tokens)
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-5
    convert_checkpoint(folder, tmp_path / "openclip", "openclip")
    state = load_file(tmp_path / "openclip/open_clip_model.safetensors")
    plain = reference.build_model(encoder.architecture.json).eval()
    plain.load_state_dict(state, strict=False)
    with torch.no_grad():
        for ours, theirs in zip(plain(images, tokens)[:2], expected, strict=True):
            assert distance(ours, theirs) < 1e-5


# Models of OpenCLIP's that transformers has a class for.
OURS = {kind: KINDS[kind] for kind in ("plain", "quick-gelu", "truncated-mlp", "worldwide",
        "patch-dropout", "three-heads", "timm-siglip", "timm-siglip2")}  # fmt: skip
OURS["custom-text"] = small_model(custom_text=True)
OURS["timm-plain-text"] = {k: v for k, v in KINDS["timm-siglip"].items() if k != "custom_text"}


@pytest.mark.parametrize("kind", OURS)
def test_features_and_bits_of_a_model_of_openclips(tmp_path, kind):
    model_cfg = OURS[kind]
    state = reference.make_checkpoint(model_cfg, seed=1, folder=tmp_path / "openclip")
    convert_checkpoint(tmp_path / "openclip", tmp_path / "hf", "huggingface")
    plain = reference.build_model(model_cfg).eval()
    plain.load_state_dict(state)
    inputs = image_batch(model_cfg, 3), token_batch(model_cfg, 3)
    with torch.no_grad():
        expected = plain(*inputs)
    theirs, report = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for ours, feature in zip(expected[:2], features(theirs, *inputs), strict=True):
        assert distance(feature, ours) < 1e-5
    assert theirs.logit_scale.exp().item() == pytest.approx(expected[2].item())
    source = open_source(tmp_path / "hf").metadata
    own = open_source(tmp_path / "openclip").metadata
    assert source.architecture.settings() == own.architecture.settings() | {
        key: value
        for key, value in source.architecture.settings().items()
        if kind.startswith("timm") and "tokenizer" in key
    }
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", "openclip")
    back = load_file(tmp_path / "back/open_clip_model.safetensors")
    if kind == "custom-text":  # of which config.json knows nothing: the names of the other class
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if kind == "timm-plain-text":
        back = {name.removeprefix("text."): tensor for name, tensor in back.items()}
    assert same(back, state)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_to_the_last_bit(saved, tmp_path, name):
    folder, model = saved[name]
    convert_checkpoint(folder, tmp_path / "run", "run")
    convert_checkpoint(tmp_path / "run", tmp_path / "hf", "huggingface")
    assert same(load_file(tmp_path / "hf" / WEIGHTS), model.state_dict())
    for section in ("text_config", "vision_config"):
        written = json.loads((tmp_path / "hf/config.json").read_text())[section]
        assert written.items() >= CONFIGS[name][section].items()
    settings = [
        json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path / "hf", folder)
    ]
    assert settings[0]["image_mean"] == settings[1]["image_mean"]


def test_the_weights_of_a_sigmoid_loss_travel_in_a_clip_model(tmp_path):
    """CLIPModel has no bias: the file keeps it, its features are the same, and it is said."""
    model_cfg = small_model(init_logit_scale=2.0, init_logit_bias=-10.0)
    state = reference.make_checkpoint(model_cfg, seed=1, folder=tmp_path / "openclip")
    said = convert_checkpoint(tmp_path / "openclip", tmp_path / "hf", "huggingface")
    assert any("a CLIPModel has no logit_bias" in line for line in said)
    theirs, report = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert report["unexpected_keys"] == {"logit_bias"}
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", "openclip")
    assert same(load_file(tmp_path / "back/open_clip_model.safetensors"), state)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_but_for_the_logit_parameters(tmp_path, precision):
    state = reference.make_checkpoint(KINDS["timm-siglip"], seed=1, folder=tmp_path / "openclip")
    convert_checkpoint(tmp_path / "openclip", tmp_path / "hf", "huggingface", precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    written = load_file(tmp_path / "hf" / WEIGHTS)
    assert all(t.dtype == dtype for n, t in written.items() if not n.startswith("logit_"))
    assert torch.equal(written["logit_bias"], state["logit_bias"].reshape(1))
    name = "text_model.head.weight"
    assert torch.equal(written[name], state["text.text_projection.weight"].to(dtype))
    assert AutoModel.from_pretrained(tmp_path / "hf").dtype == dtype


# ------------------------------------------------------------------ the folder that is written

LABELS = ["a cat, on a Mat", "dog photo", "Photo of a   DOG."]


def told_as_said(classify, said):
    """The pipeline, after the line of Python that the conversion gives for it, if it does."""
    for line in (note.split(" write: ")[1] for note in said if " write: " in note):
        exec(line, {"classify": classify})
    return classify


@pytest.mark.parametrize("family, tokens", [("clip", 16), ("siglip", 64), ("siglip", 11)])
def test_a_zero_shot_pipeline_just_works(tmp_path, family, tokens):
    """Tokenizer, pictures and probabilities are those of our own model."""
    if family == "clip":
        model_cfg = small_model(text={"vocab_size": 49408, "context_length": tokens})
        settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
    else:
        text = KINDS["timm-siglip2"]["text_cfg"] | {
            "context_length": tokens, "hf_tokenizer_name": "timm/x",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        }  # fmt: skip
        model_cfg = KINDS["timm-siglip2"] | {"text_cfg": text}
        settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    source, target = tmp_path / "openclip", tmp_path / "hf"
    state = reference.random_weights(model_cfg, seed=1)
    source.mkdir()
    save_file(state, source / "open_clip_model.safetensors")
    (source / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": settings})
    )
    if family == "siglip":
        make_unigram(source)
    said = convert_checkpoint(source, target, "huggingface")
    encoder = load_encoder(source)
    transform = evaluation_transform(encoder.preprocess)
    pixels = encoder.encode_image(transform(picture())[None])
    cosines = pixels @ encoder.encode_text(encoder.tokenizer(LABELS)).T
    logits = cosines * state["logit_scale"].exp()
    if family == "clip":
        expected = logits.softmax(-1)
    else:
        expected = torch.sigmoid(logits + state["logit_bias"])
    classify = told_as_said(pipeline("zero-shot-image-classification", model=str(target)), said)
    assert ("_preprocess_params" in (target / "README.md").read_text()) == (tokens == 11)
    found = classify(picture(), candidate_labels=LABELS, hypothesis_template="{}")
    found = {entry["label"]: entry["score"] for entry in found}
    for label, probability in zip(LABELS, expected[0].tolist(), strict=True):
        # The pipeline rounds probabilities of a sigmoid to four places, and resizes on tensors.
        assert found[label] == pytest.approx(probability, abs=1e-3)
    processor = AutoProcessor.from_pretrained(target)
    fitted = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    inputs = processor(text=LABELS, images=picture(), **fitted)
    theirs = AutoModel.from_pretrained(target)(**inputs).logits_per_image
    ours = logits + state.get("logit_bias", 0)
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)
    again = load_encoder(target)
    assert again.preprocess == encoder.preprocess
    assert torch.equal(again.tokenizer(LABELS), encoder.tokenizer(LABELS))
    assert again.architecture.settings() == encoder.architecture.settings()


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_of_texts_with_padding_on_either_side(tmp_path, monkeypatch, side):
    """OpenCLIP's text tower works on the padding; a CLIPModel masks it, where it is told of it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = {"vocab_size": 300, "hf_tokenizer_name": "a/name", "pool_type": "eos", "eos_id": 1}
    model_cfg = small_model(text=text)
    source = tmp_path / "openclip"
    state = reference.make_checkpoint(model_cfg, seed=1, folder=source)
    make_unigram(source)
    settings = {"pad_token": "<pad>", "padding_side": side}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    said = convert_checkpoint(source, tmp_path / "hf", "huggingface")
    plain = reference.build_model(model_cfg).eval()
    plain.load_state_dict(state)
    # open_clip opens the folder that is written for it, as this one names no class.
    convert_checkpoint(source, tmp_path / "for open_clip", "openclip")
    tokenizer = HFTokenizer(str(tmp_path / "for open_clip"), context_length=13)
    model = AutoModel.from_pretrained(tmp_path / "hf")
    texts = ["a dog", "photo of a  dog", " dog\nphoto"]
    inputs = AutoProcessor.from_pretrained(tmp_path / "hf")(
        text=texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = plain.encode_text(tokenizer(texts))
        found = model.get_text_features(**inputs)
    assert distance(getattr(found, "pooler_output", found), expected) < 1e-5
    if side == "left":  # on the right, padding changes nothing
        classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "hf"))
        settings = told_as_said(classify, said)._preprocess_params
        prepared = classify.preprocess(picture(), texts, "{}", **settings)["text_inputs"][0]
        assert torch.equal(prepared["input_ids"], inputs["input_ids"])


def test_a_folder_of_siglip_without_a_processor_says_what_is_taken(tmp_path):
    save(CONFIGS["siglip"], tmp_path / "hf")
    make_unigram(tmp_path / "hf")
    said = convert_checkpoint(tmp_path / "hf", tmp_path / "target", "openclip")
    assert any("holds no preprocessor_config.json; SigLIP's usual one is taken" in s for s in said)
    settings = json.loads((tmp_path / "target/open_clip_config.json").read_text())["preprocess_cfg"]
    assert (settings["mean"], settings["resize_mode"]) == ([0.5] * 3, "squash")


def test_a_folder_ready_to_publish(tmp_path):
    """Nothing pickled, and a card whose header the hub's own library reads."""
    reference.make_checkpoint(KINDS["plain"], seed=1, folder=tmp_path / "openclip")
    for to, library in (("huggingface", "transformers"), ("openclip", "open_clip")):
        target = tmp_path / f"to {to}"
        convert_checkpoint(tmp_path / "openclip", target, to, license_name="cc-by-4.0")
        assert {f.suffix for f in target.iterdir()} == {".json", ".safetensors", ".md"}
        header = ModelCard.load(target / "README.md").data.to_dict()
        assert (header["library_name"], header["license"]) == (library, "cc-by-4.0")
        assert header["pipeline_tag"] == "zero-shot-image-classification"


def test_large_models_are_cut_into_shards(tmp_path, monkeypatch):
    state = reference.make_checkpoint(KINDS["timm-siglip"], seed=1, folder=tmp_path / "openclip")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 100_000)
    convert_checkpoint(tmp_path / "openclip", tmp_path / "hf", "huggingface")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [s.name for s in shards] == sorted({*index["weight_map"].values()}) and len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 100_000 and index["metadata"]["total_size"] == sum(sizes)
    theirs, report = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and theirs.config.model_type == "siglip"
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", "openclip")
    assert same(load_file(tmp_path / "back/open_clip_model.safetensors"), state)


# ------------------------------------------------------------------------- kinds of sources


def one_file(folder, state):
    save_file(state, folder / WEIGHTS)


def a_pickled_file(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def halves(state):
    names = sorted(state)
    return {n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}


def write_index(folder, parts, pattern):
    names = [pattern.format(number, len(parts)) for number in range(1, len(parts) + 1)]
    weight_map = {n: file for part, file in zip(parts, names, strict=True) for n in part}
    index = "model.safetensors" if pattern.endswith("safetensors") else "pytorch_model.bin"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def shards(folder, state):
    parts = halves(state)
    names = write_index(folder, parts, "model-{:05d}-of-{:05d}.safetensors")
    for part, name in zip(parts, names, strict=True):
        save_file(part, folder / name)


def pickled_shards(folder, state):
    parts = halves(state)
    names = write_index(folder, parts, "pytorch_model-{:05d}-of-{:05d}.bin")
    for part, name in zip(parts, names, strict=True):
        torch.save(part, folder / name)


@pytest.fixture
def folder(tmp_path):
    """A folder with everything of a CLIPModel but its weights."""
    made = tmp_path / "source"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIGS["clip"]))
    return with_processor_and_tokenizer(made)


STATE = {name: tensor.detach() for name, tensor in build(CONFIGS["clip"]).state_dict().items()}


@pytest.mark.parametrize("write", [one_file, a_pickled_file, shards, pickled_shards])
def test_each_kind_of_file_gives_the_same_tensors(folder, tmp_path, write):
    """Old files hold the numbers of positions, too."""
    positions = {
        f"{tower}_model.embeddings.position_ids": torch.arange(17)[None]
        for tower in ("text", "vision")
    }
    write(folder, STATE | positions | {"logit_scale": STATE["logit_scale"].reshape(1)})
    convert_checkpoint(folder, tmp_path / "target", "huggingface")
    assert same(load_file(tmp_path / "target" / WEIGHTS), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "clip.", "model.", "module.a.clip."])
def test_what_stands_before_all_names_is_left_out(folder, tmp_path, prefix):
    named = {f"{prefix}{name}": tensor for name, tensor in STATE.items()}
    named[f"{prefix}vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    shards(folder, named)
    said = prefix.replace("module.", "").replace("_orig_mod.", "")
    notes = convert_checkpoint(folder, tmp_path / "target", "huggingface")
    assert any(f"begin with {said!r}" in note for note in notes) == bool(said)
    assert same(load_file(tmp_path / "target" / WEIGHTS), STATE)
    # A file by its name, which is known by its tensors alone.
    torch.save(named, folder / "mine.bin")
    convert_checkpoint(folder / "mine.bin", tmp_path / "again", "huggingface")
    assert same(load_file(tmp_path / "again" / WEIGHTS), STATE)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"classifier.weight": torch.zeros(1)}, "unknown: classifier.weight$"),
        ({"other.vision_model.x": torch.zeros(1)}, "unknown: other.vision_model.x$"),
        ({"logit_scale": torch.zeros(())}, "two models: logit_scale beside clip.logit_scale"),
    ],
)
def test_what_has_not_the_common_prefix_is_told(folder, more, told):
    torch.save({f"clip.{n}": t for n, t in STATE.items()} | more, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=told):
        open_source(folder)


def test_a_file_or_an_index_may_be_named(folder):
    shards(folder, STATE)
    one_file(folder, {n: t + 1 for n, t in STATE.items()})
    for name, more in (("model.safetensors.index.json", 0), (WEIGHTS, 1)):
        source = open_source(folder / name)
        assert torch.equal(source.read("logit_scale"), STATE["logit_scale"] + more)
    assert open_source(folder).read("logit_scale") == STATE["logit_scale"] + 1  # as transformers


def test_a_folder_that_is_both_is_openclips(folder, tmp_path):
    """As the repositories of OpenCLIP's own models are."""
    one_file(folder, STATE)
    expected = reference.make_checkpoint(KINDS["plain"], seed=3, folder=tmp_path / "openclip")
    for file in (tmp_path / "openclip").iterdir():
        shutil.copy(file, folder)
    source = open_source(folder)
    assert torch.equal(source.read("visual.proj"), expected["visual.proj"])
    assert "visual.proj" in open_source(folder / WEIGHTS).shapes()  # of the model of Hugging Face


def test_a_config_of_another_tool_makes_no_folder_of_hugging_faces(tmp_path):
    expected = reference.make_checkpoint(KINDS["plain"], seed=3, folder=tmp_path / "mine")
    (tmp_path / "mine/open_clip_model.safetensors").rename(tmp_path / "mine/mine.safetensors")
    (tmp_path / "mine/open_clip_config.json").rename(tmp_path / "model.json")
    for content in ("[1]", "{}", "{", "3"):
        (tmp_path / "mine/config.json").write_text(content)
        source = open_source(tmp_path / "mine")
        assert torch.equal(source.read("visual.proj"), expected["visual.proj"])


def test_what_says_all_this_is_named(folder, tmp_path):
    one_file(folder, STATE)
    (folder / "README.md").write_text("# mine")
    said = convert_checkpoint(folder, tmp_path / "target", "openclip")
    assert any("preprocessor_config.json)" in line and "mean 0.4" in line for line in said)
    assert any(
        "config.json leaves out logit_scale_init_value, text_config.hidden_act, " in line
        for line in said
    )
    assert any("README.md is not copied" in line for line in said)


def test_a_trunk_that_open_clip_builds_otherwise_is_said(saved, tmp_path):
    folder, _ = saved["siglip"]
    said = convert_checkpoint(folder, tmp_path / "target", "openclip")
    assert any("open_clip does not read vision_cfg.width" in line for line in said)


def test_a_named_model_meets_the_checkpoints_own(folder, tmp_path):
    one_file(folder, STATE)
    (tmp_path / "gelu.json").write_text(
        json.dumps(open_source(folder).metadata.architecture.json | {"quick_gelu": False})
    )
    with pytest.raises(InputError, match=r"than .*config.json says: quick_gelu is True there"):
        convert_checkpoint(
            folder, tmp_path / "target", "run", choice=ModelChoice(str(tmp_path / "gelu.json"))
        )


# ------------------------------------------------------------------------------ what is refused


def a_cut_file(folder):
    one_file(folder, STATE)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    return "not a safetensors file, or not whole"


def a_shard_missing(folder):
    shards(folder, STATE)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return r"2 shards, of which 1 are not there \(model-00002-of-00002.safetensors\): half a check"


def a_cut_shard(folder):
    shards(folder, STATE)
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return "model-00001-of-00002.safetensors is not a safetensors file"


def a_shard_of_another_model(folder):
    shards(folder, STATE)
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    return "is in model-00001-of-00002.safetensors, and it is not .47 such tensors"


def shards_without_their_index(folder):
    shards(folder, STATE)
    (folder / "model.safetensors.index.json").unlink()
    return "shards without model.safetensors.index.json"


def an_index_of_other_folders(folder):
    weight_map = {name: "../../etc/passwd" for name in STATE}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "passwd' is no file of its folder"


def a_broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "index.json cannot be read as JSON"


def no_weights(folder):
    (folder / "tf_model.h5").write_bytes(b"")
    return "none of model.safetensors, .*; it holds weights of TensorFlow"


def a_pickle_with_code(folder):
    torch.save(
        STATE | {"more": Malicious(f"touch '{folder.parent}/was here'")},
        folder / "pytorch_model.bin",
    )
    return "no torch file of plain tensors"


def shapes_of_another_model(folder):
    name = "text_model.embeddings.token_embedding.weight"
    one_file(folder, STATE | {name: torch.zeros(102, 32)})
    return rf"of another shape: {name} is \[102, 32\], not \[101, 32\]"


def half_a_model(folder):
    one_file(folder, {n: t for n, t in STATE.items() if n.startswith("vision_model.")})
    return "missing: logit_scale, visual_projection.weight, text_model.* and [0-9]+ more$"


def more_than_a_model(folder):
    one_file(folder, STATE | {"classifier.weight": torch.zeros(2, 2), "logit_more": torch.zeros(1)})
    return "unknown: classifier.weight, logit_more$"


def something_else(folder):
    one_file(folder, {"bert.embeddings.weight": torch.zeros(3, 3)})
    return "missing: logit_scale, .* more; unknown: bert.embeddings.weight"


def two_scales(folder):
    one_file(folder, STATE | {"logit_scale": torch.zeros(2)})
    return r"logit_scale is \[2\], not \[\]"


def not_finite(folder):
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    one_file(folder, STATE | {name: torch.full((48, 48), float("nan"))})
    return r"in_proj_weight in .* not finite: 2,304 of its 6,912"


def of_whole_numbers(folder):
    one_file(folder, {n: t.to(torch.int8) for n, t in STATE.items()})
    return "is of torch.int8"


def of_a_sparse_tensor(folder):
    name = "text_projection.weight"
    torch.save(STATE | {name: STATE[name].to_sparse()}, folder / "pytorch_model.bin")
    return "text_projection.weight in .*pytorch_model.bin is stored as torch.sparse_coo"


def an_index_with_nothing(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return "index.json is no index of shards: it has no weight_map"


def an_index_of_a_name_that_is_too_long(folder):
    weight_map = dict.fromkeys(STATE, "x" * 300)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "1 shards, of which 1 are not there"


def a_deep_index(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    return "index.json cannot be read as JSON: it is nested"


def a_deep_config(folder):
    one_file(folder, STATE)
    (folder / "config.json").write_text("[" * 100_000)
    return "config.json cannot be read as JSON: it is nested"


def a_config_that_is_a_folder(folder):
    one_file(folder, STATE)
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").mkdir()
    return "preprocessor_config.json cannot be read: Is a directory"


def another_architecture(folder):
    one_file(folder, STATE)
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    return "is of a BertModel"


def a_config_that_is_no_json(folder):
    one_file(folder, STATE)
    (folder / "config.json").write_text("{")
    return "config.json cannot be read as JSON"


def another_processor(folder):
    one_file(folder, STATE)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BlipImageProcessor"}'
    )
    return "preprocessor_config.json is of a BlipImageProcessor"


DAMAGES = [
    a_cut_file, a_shard_missing, a_cut_shard, a_shard_of_another_model, shards_without_their_index,
    an_index_of_other_folders, a_broken_index, no_weights, a_pickle_with_code,
    shapes_of_another_model, half_a_model, more_than_a_model, something_else, two_scales,
    not_finite, of_whole_numbers, another_architecture, a_config_that_is_no_json, another_processor,
    of_a_sparse_tensor, an_index_with_nothing, an_index_of_a_name_that_is_too_long, a_deep_index,
    a_deep_config, a_config_that_is_a_folder,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_told_and_nothing_written(folder, tmp_path, damage):
    told = damage(folder)
    before = sorted(tmp_path.rglob("*"))
    for to in ("openclip", "huggingface", "run"):
        with pytest.raises(InputError, match=f"(?s){told}"):
            convert_checkpoint(folder, tmp_path / "new/target", to)
    assert sorted(tmp_path.rglob("*")) == before  # and no code was run


def test_names_of_hugging_faces_without_a_config(tmp_path):
    save_file(STATE, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="no config.json is beside it, which says .* heads"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"also_bin": True}, "--bin is for --to openclip"),
        ({"license_name": "Apache 2.0"}, "no identifier of a licence .* such as apache-2.0"),
        ({"optimizer_batch": 8}, "--with-optimizer is for --to run"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, options, told):
    one_file(folder, STATE)
    with pytest.raises(InputError, match=told):
        convert_checkpoint(folder, tmp_path / "target", "huggingface", **options)
    with pytest.raises(InputError, match="--license is for the model card"):
        convert_checkpoint(folder, tmp_path / "target", "run", license_name="mit")
    assert not (tmp_path / "target").exists()


def test_a_disk_that_fills_up_leaves_nothing(folder, tmp_path, monkeypatch):
    one_file(folder, STATE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", full)
    with pytest.raises(InputError, match="cannot write to .*target: No space left on device"):
        convert_checkpoint(folder, tmp_path / "new/target", "huggingface")
    assert os.listdir(tmp_path) == ["source"]


def test_open_clip_loads_what_comes_from_transformers(saved, tmp_path):
    folder, model = saved["clip"]
    convert_checkpoint(folder, tmp_path / "target", "openclip")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/target")
    architecture = open_source(folder).metadata.architecture
    images, tokens = inputs_of(architecture)
    with torch.no_grad():
        found = theirs.eval()(images, tokens)[:2]
    for ours, expected in zip(found, features(model, images, tokens), strict=True):
        assert distance(ours, expected) < 1e-5
