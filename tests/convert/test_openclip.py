"""OpenCLIP's checkpoints to ours and back, and what is refused."""

import json
import os
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.native import write_run
from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.convert.openclip import write_openclip
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import load_encoder
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.small_models import KINDS, distance, image_batch, small_model, token_batch

MODEL = small_model({"ls_init_value": 0.3})
PREPROCESS = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}


def weights_of(folder, model_cfg=MODEL) -> ModelWeights:
    return ModelWeights(open_source(folder), architecture_from_json(model_cfg, "small"))


def to_openclip(source, target, model_cfg=MODEL, **options) -> dict[str, torch.Tensor]:
    write_openclip(target, weights_of(source, model_cfg), PREPROCESS, TokenizerFiles(), **options)
    return load_file(target / "open_clip_model.safetensors")


@pytest.fixture
def original(tmp_path):
    return reference.make_checkpoint(MODEL, seed=1, folder=tmp_path / "original")


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_to_the_last_bit(tmp_path, kind):
    """Both classes of OpenCLIP: text towers with and without "text." before their names."""
    model_cfg = KINDS[kind]
    theirs = reference.make_checkpoint(model_cfg, seed=1, folder=tmp_path / "original")
    source = open_source(tmp_path / "original")
    architecture = source.metadata.architecture
    assert architecture == architecture_from_json(model_cfg, kind)
    tokenizer = TokenizerFiles(architecture.text.tokenizer)
    write_run(tmp_path / "run", ModelWeights(source, architecture), PREPROCESS, tokenizer)
    run = open_source(tmp_path / "run")
    assert run.metadata.architecture == architecture
    assert (run.metadata.preprocess, run.metadata.step) == (PREPROCESS, 0)
    assert same(to_openclip(tmp_path / "run", tmp_path / "back", model_cfg), theirs)


def test_a_trunk_of_timm_at_a_size_that_it_has_no_name_for(tmp_path):
    """open_clip builds it at the size of its name, and loads it as the note says."""
    vision = {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map"}
    vision |= {"timm_proj": None, "image_size": [64, 48]}
    text = {"layers": 1, "vocab_size": 49408}
    model = small_model({}, text, custom_text=True) | {"vision_cfg": vision}
    reference.make_checkpoint(model, seed=1, folder=tmp_path / "x")
    notes = convert_checkpoint(tmp_path / "x", tmp_path / "y", "openclip")
    told = [note for note in notes if "for 384 x 384 pixels, whatever vision_cfg.image" in note]
    assert len(told) == 1 and "force_image_size=(64, 48)" in told[0]
    theirs = open_clip.create_model(
        f"local-dir:{tmp_path}/y", load_weights=False, force_image_size=(64, 48)
    ).eval()
    open_clip.factory.load_checkpoint(theirs, str(tmp_path / "y/open_clip_model.safetensors"))
    encoder = load_encoder(tmp_path / "y")
    images, tokens = image_batch(model, 3), token_batch(model, 3)
    with torch.no_grad():
        assert distance(encoder.encode_image(images), theirs.encode_image(images, True)) < 1e-6
        assert distance(encoder.encode_text(tokens), theirs.encode_text(tokens, True)) < 1e-6


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_open_clip_loads_it_with_the_same_features(tmp_path, original, form):
    target = tmp_path / "written"
    to_openclip(tmp_path / "original", target, also_bin=True)
    if form == "bin":
        (target / "open_clip_model.safetensors").unlink()
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{target}")
    assert transform.transforms[-1].mean == [0.5, 0.5, 0.5]
    plain = reference.build_model(MODEL)
    plain.load_state_dict(original)
    inputs = image_batch(MODEL, 3), token_batch(MODEL, 3)
    with torch.no_grad():
        for ours, theirs in zip(model.eval()(*inputs), plain.eval()(*inputs), strict=True):
            assert torch.equal(ours, theirs)
    settings = json.loads((target / "open_clip_config.json").read_text())
    assert settings == {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    assert same(dict(pairs(weights_of(target))), original)


def test_the_size_of_pictures_is_written(tmp_path):
    """open_clip's default is 224 for every trunk; this one is built for 384."""
    vision = {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map"}
    model_cfg = small_model({}, {}, custom_text=True) | {"vision_cfg": vision | {"layers": 1}}
    save_file(reference.random_weights(model_cfg, seed=1), tmp_path / "weights.safetensors")
    to_openclip(tmp_path / "weights.safetensors", tmp_path / "written", model_cfg)
    settings = json.loads((tmp_path / "written/open_clip_config.json").read_text())
    assert settings["model_cfg"]["vision_cfg"] == model_cfg["vision_cfg"] | {"image_size": 384}


def pairs(weights: ModelWeights):
    for name in reference.build_model(MODEL).state_dict():
        yield name, weights.read(name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_rounds_once(tmp_path, original, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    written = to_openclip(tmp_path / "original", tmp_path / "half", precision=precision)
    expected = {name: tensor.to(dtype) for name, tensor in original.items()}
    expected["logit_scale"] = original["logit_scale"]  # whose rounding would change the loss
    assert same(written, expected)


def test_the_state_dict_of_openclips_trainer(tmp_path, original):
    """As open_clip_train saves it from under DDP, logit_scale with or without a shape."""
    state = {f"module.{name}": tensor for name, tensor in original.items()}
    state["module.logit_scale"] = original["logit_scale"].reshape(1)
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    source = open_source(tmp_path / "epoch_3.pt")
    assert source.metadata.architecture is None
    weights = ModelWeights(source, architecture_from_json(MODEL, "small"))
    assert same(dict(pairs(weights)), original)


@pytest.mark.parametrize("custom_text", [False, True])
def test_names_of_the_other_class_are_taken(tmp_path, custom_text):
    written = MODEL | {"custom_text": not custom_text}
    wanted = MODEL | {"custom_text": custom_text}
    theirs = reference.make_checkpoint(written, seed=2, folder=tmp_path / "other")
    ours = to_openclip(tmp_path / "other", tmp_path / "renamed", wanted)
    assert ours.keys() == reference.build_model(wanted).state_dict().keys()
    for name, tensor in ours.items():
        twin = f"text.{name}" if f"text.{name}" in theirs else name.removeprefix("text.")
        assert torch.equal(tensor, theirs.get(name, theirs.get(twin)))


# ---------------------------------------------------------------------------------- refusals


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_nothing_in_a_pickled_file_is_run(tmp_path, original, save):
    file, trace = tmp_path / "open_clip_pytorch_model.bin", tmp_path / "was here"
    save({**original, "more": Malicious(f"touch '{trace}'")}, file)
    with pytest.raises(InputError, match="no torch file of plain tensors"):
        open_source(tmp_path).shapes()
    assert not trace.exists()


def test_other_architectures_are_named(tmp_path, original):
    with pytest.raises(InputError, match="missing: .*resblocks.2.* and 11 more"):
        weights_of(tmp_path / "original", small_model({"ls_init_value": 0.3, "layers": 3}))
    with pytest.raises(InputError, match="not part of the model: .*gamma"):
        weights_of(tmp_path / "original", small_model())
    with pytest.raises(
        InputError, match=r"\[101, 32\], not \[102, 32\].* text_cfg.vocab_size is 101"
    ):
        weights_of(tmp_path / "original", small_model({"ls_init_value": 0.3}, {"vocab_size": 102}))


def test_a_target_with_something_in_it_is_refused(tmp_path, original):
    target = tmp_path / "full"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        to_openclip(tmp_path / "original", target)
    assert [f.name for f in target.iterdir()] == ["thesis.txt"]


def write_nothing(folder):
    pass


def cut_short(folder):
    save_file({"a": torch.zeros(100)}, folder / "open_clip_model.safetensors")
    content = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(content[:-50])


def pickle_cut_short(folder):
    torch.save({"a": torch.zeros(100)}, folder / "open_clip_pytorch_model.bin")
    content = (folder / "open_clip_pytorch_model.bin").read_bytes()
    (folder / "open_clip_pytorch_model.bin").write_bytes(content[:-200])


def no_tensors(folder):
    torch.save({"a": 3}, folder / "open_clip_pytorch_model.bin")


def hugging_face(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


def broken_config(folder):
    save_file({"a": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text("{")


@pytest.mark.parametrize(
    "make, message",
    [
        (write_nothing, "holds no checkpoint"),
        (cut_short, "not a safetensors file"),
        (pickle_cut_short, "no torch file of plain tensors"),
        (no_tensors, "no state dict of tensors"),
        (hugging_face, "config.json is of a bert .* CLIPModel and SiglipModel"),
        (broken_config, "open_clip_config.json cannot be read as JSON"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path).shapes()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "nowhere")
