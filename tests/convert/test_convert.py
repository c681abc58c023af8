"""`convert_checkpoint`: what travels, what is rounded, and that a failure leaves nothing."""

import json
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_clip.convert.choose_model import ModelChoice
from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.data.samples.tokenizer import build_tokenizer
from parallel_clip.errors import InputError
from tests import reference
from tests.data.samples.odd_captions import ODD
from tests.data.samples.tokenizer_folders import make_bert, make_gemma, make_spiece, make_unigram
from tests.small_models import small_model

MODEL = small_model()
STATE = reference.random_weights(MODEL, seed=1)
WEIGHTS = "open_clip_model.safetensors"


def source_of(folder, state=STATE, model=MODEL):
    folder.mkdir()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return folder


# ---------------------------------------------------------------------- no half a target


def a_value(value):
    return STATE | {"visual.proj": torch.full_like(STATE["visual.proj"], value)}


FAILURES = {
    "overflow in fp16": (a_value(1e5), {"precision": "fp16"}, "visual.proj has values up to 1e.05"),
    "overflow in bf16": (a_value(3.4e38), {"precision": "bf16"}, "visual.proj .* become infinite"),
    "not finite": (a_value(float("nan")), {}, "visual.proj .* not finite: 1,152 of its 1,152"),
    "of another model": ({"a": torch.zeros(1)}, {}, "not those of"),
}


@pytest.mark.parametrize(
    "failure, to",
    [(failure, "openclip") for failure in FAILURES]
    + [(failure, "run") for failure in ("not finite", "of another model")],
)
def test_a_failed_conversion_leaves_nothing(tmp_path, failure, to):
    state, options, told = FAILURES[failure]
    source_of(tmp_path / "source", state)
    with pytest.raises(InputError, match=told):
        convert_checkpoint(tmp_path / "source", tmp_path / "new/target", to, **options)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["openclip", "run"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, to):
    source_of(tmp_path / "source")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    place = "openclip.write_safetensors" if to == "openclip" else "native.write_index"
    monkeypatch.setattr(f"parallel_clip.convert.{place}", full)
    (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match="cannot write to .*target: No space left on device"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", to)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["source", "target"]
    assert not any((tmp_path / "target").iterdir())


def test_a_target_may_be_an_empty_folder_or_a_link_to_one(tmp_path):
    source_of(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    os.symlink(tmp_path / "empty", tmp_path / "link")
    convert_checkpoint(tmp_path / "source", tmp_path / "link", "openclip")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / WEIGHTS).is_file()


# ---------------------------------------------------------------------- tensors as they are


def shared_tensors():
    """Two names for one tensor, views of a larger one, and one that is not contiguous."""
    state = dict(STATE)
    for kind in ("weight", "bias"):
        state[f"visual.ln_post.{kind}"] = state[f"visual.ln_pre.{kind}"]
    large = torch.randn(10, 24, 48)
    state["visual.proj"] = large[3].T
    state["visual.class_embedding"] = large[3][0]
    return state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("to", ["openclip", "run"])
def test_shared_tensors_are_written_each(tmp_path, to, precision):
    state = shared_tensors()
    source = source_of(tmp_path / "source", state)
    if to == "run":
        convert_checkpoint(source, tmp_path / "run", "run")
        source = tmp_path / "run"
    convert_checkpoint(source, tmp_path / "back", "openclip", precision, also_bin=True)
    pickled = torch.load(tmp_path / "back/open_clip_pytorch_model.bin", weights_only=True)
    for written in (load_file(tmp_path / "back" / WEIGHTS), pickled):
        for name, tensor in state.items():
            dtype = (
                torch.float32 if precision == "fp32" or name == "logit_scale" else torch.bfloat16
            )
            assert torch.equal(written[name], tensor.to(dtype))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_logit_parameters_are_not_rounded(tmp_path, precision, shape):
    model = small_model(init_logit_scale=1.0, init_logit_bias=-10.0)
    state = reference.random_weights(model, seed=2)
    scale, bias = torch.tensor(100.0).log(), torch.tensor(-10.123456)
    state |= {"logit_scale": scale.reshape(shape), "logit_bias": bias.reshape(shape)}
    source_of(tmp_path / "source", state, model)
    convert_checkpoint(tmp_path / "source", tmp_path / "half", "openclip", precision)
    written = load_file(tmp_path / "half" / WEIGHTS)
    assert torch.equal(written["logit_scale"], scale) and torch.equal(written["logit_bias"], bias)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/half")
    assert theirs.logit_scale.exp().item() == pytest.approx(100, abs=1e-4)


# ---------------------------------------------------------------------- what is said of both


def test_an_override_makes_the_named_model(tmp_path):
    source_of(tmp_path / "source")
    (tmp_path / "gelu.json").write_text(json.dumps(small_model(quick_gelu=True)))
    choice = ModelChoice(str(tmp_path / "gelu.json"), ["quick_gelu"])
    said = convert_checkpoint(tmp_path / "source", tmp_path / "to", "openclip", choice=choice)
    assert open_source(tmp_path / "to").metadata.architecture.json["quick_gelu"]
    assert any("preprocessing: " in line and "OpenCLIP's defaults" in line for line in said)


@pytest.mark.parametrize("to", ["openclip", "run"])
def test_preprocessing_travels(tmp_path, to):
    state = tmp_path / "bare.safetensors"
    save_file(STATE, state)
    settings = {"mean": [0.1, 0.2, 0.3], "std": 0.5, "interpolation": "bilinear"}
    described = {"model_cfg": MODEL, "preprocess_cfg": settings}
    (tmp_path / "model.json").write_text(json.dumps(described))
    choice = ModelChoice(str(tmp_path / "model.json"))
    said = convert_checkpoint(state, tmp_path / "to", to, choice=choice)
    written = open_source(tmp_path / "to").metadata.preprocess
    assert (written["mean"], written["std"]) == ([0.1, 0.2, 0.3], [0.5] * 3)
    assert any("mean 0.1 0.2 0.3" in line and "model.json" in line for line in said)


def tokenizer_of(folder):
    """The tokenizer that a checkpoint is evaluated with."""
    said = open_source(folder).metadata
    return build_tokenizer(said.tokenizer, said.architecture.text, said.folder)


@pytest.mark.filterwarnings("ignore:This sequence already has")  # of captions that end in </s>
@pytest.mark.parametrize("make", [make_bert, make_unigram, make_spiece, make_gemma])
def test_a_tokenizer_travels_in_every_direction(tmp_path, make):
    model = small_model(
        text={"hf_tokenizer_name": "a/name", "vocab_size": 1200, "pool_type": "last",
              "tokenizer_kwargs": {"clean": "whitespace"}}
    )  # fmt: skip
    source = source_of(tmp_path / "source", reference.random_weights(model, seed=1), model)
    make(source)
    texts = ["A Photo of a dog", "dog photo &amp; cat", *ODD]
    expected = tokenizer_of(source)(texts)
    hop = source
    for number, to in enumerate(("run", "openclip", "run", "openclip")):
        target = tmp_path / f"{number}"
        said = convert_checkpoint(hop, target, to)
        assert any(line.startswith("tokenizer: a/name, in") for line in said)
        assert torch.equal(tokenizer_of(target)(texts), expected)
        if to == "openclip":
            theirs = open_clip.get_tokenizer(f"local-dir:{target}")(texts)
            assert torch.equal(theirs, expected)
        hop = target
    assert open_source(hop).metadata.architecture == open_source(source).metadata.architecture


def test_a_tokenizer_that_is_not_there_is_said(tmp_path):
    model = small_model(text={"hf_tokenizer_name": "bert-base-uncased"})
    source_of(tmp_path / "source", reference.random_weights(model, seed=1), model)
    said = convert_checkpoint(tmp_path / "source", tmp_path / "to", "openclip")
    assert any("files of bert-base-uncased are not beside the weights" in line for line in said)


# ---------------------------------------------------------------------- the optimizer


def open_clip_trainer(folder, rule, custom_text=False):
    """Three steps of AdamW in open_clip_train's groups; returns its state by name."""
    model = reference.build_model(MODEL | {"custom_text": custom_text})
    named = list(model.named_parameters())
    spared = [p for n, p in named if rule(n, p)]
    others = [p for n, p in named if not rule(n, p)]
    optimizer = torch.optim.AdamW([{"params": spared, "weight_decay": 0.0}, {"params": others}])
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = {f"module.{n}": t for n, t in model.state_dict().items()}
    saved = {"epoch": 1, "name": "x", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "epoch_1.pt")
    return {name: optimizer.state[p] for name, p in named}


def rule_3(name, parameter):
    words = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(word in name for word in words)


def rule_4(name, parameter):
    return rule_3(name, parameter) or "positional_embedding" in name or "class_embedding" in name


@pytest.mark.parametrize("rule", [rule_3, rule_4])
@pytest.mark.parametrize("custom_text", [False, True])
def test_adamws_state_by_names(tmp_path, rule, custom_text):
    expected = open_clip_trainer(tmp_path, rule, custom_text)
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"custom_text": custom_text}))
    choice = ModelChoice(str(tmp_path / "model.json"))
    said = convert_checkpoint(
        tmp_path / "epoch_1.pt", tmp_path / "run", "run", choice=choice, optimizer_batch=16
    )
    assert "AdamW's state after step 3 comes along" in said
    source = open_source(tmp_path / "run")
    assert source.metadata.step == 3
    for name, state in expected.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(source._reader.read(f"{kind}:{name}"), state[kind])
    said = convert_checkpoint(tmp_path / "epoch_1.pt", tmp_path / "weights", "run", choice=choice)
    assert any("its optimizer is left behind" in line for line in said)


def without_optimizer(saved):
    del saved["optimizer"]


def of_a_locked_tower(saved):
    groups = saved["optimizer"]["param_groups"]
    saved["optimizer"]["state"].pop(groups[1]["params"].pop())


def of_another_order(saved):
    groups = saved["optimizer"]["param_groups"]
    groups[1]["params"].reverse()


def of_sgd(saved):
    for entry in saved["optimizer"]["state"].values():
        del entry["exp_avg_sq"]


def of_two_steps(saved):
    saved["optimizer"]["state"][0]["step"] += 1


def of_no_step(saved):
    saved["optimizer"]["state"][0]["step"] = float("nan")


def of_no_groups(saved):
    saved["optimizer"]["param_groups"] = None


def of_a_group_without_parameters(saved):
    del saved["optimizer"]["param_groups"][1]["params"]


def of_numbers_twice(saved):
    params = saved["optimizer"]["param_groups"][0]["params"]
    params[1] = params[0]


def of_numbers_that_are_none(saved):
    saved["optimizer"]["param_groups"][0]["params"][1] = [1]


def of_a_list_of_states(saved):
    saved["optimizer"]["state"] = [1, 2]


def of_moments_that_are_numbers(saved):
    saved["optimizer"]["state"][0] |= {"exp_avg": 1, "exp_avg_sq": 2}


def of_sparse_moments(saved):
    entry = saved["optimizer"]["state"][1]
    entry["exp_avg"] = entry["exp_avg"].to_sparse()


def of_whole_moments(saved):
    entry = saved["optimizer"]["state"][1]
    entry["exp_avg"] = entry["exp_avg"].long()


SPOILED = {
    without_optimizer: "holds no optimizer state",
    of_a_locked_tower: "a locked tower, or another optimizer",
    of_another_order: "is not open_clip_train's AdamW",
    of_sgd: "is not open_clip_train's AdamW",
    of_two_steps: "have to be one number of updates, not 3, 4",
    of_no_step: "have to be one number of updates, not .*None",
    of_no_groups: "not the state dict of one of torch's",
    of_a_group_without_parameters: "not the state dict of one of torch's",
    of_numbers_twice: "not the state dict of one of torch's",
    of_numbers_that_are_none: "not the state dict of one of torch's",
    of_a_list_of_states: "not the state dict of one of torch's",
    of_moments_that_are_numbers: "is not open_clip_train's AdamW",
    of_sparse_moments: "exp_avg of .* is stored as torch.sparse_coo",
    of_whole_moments: "exp_avg of .* is of torch.int64",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_another_optimizer_is_refused(tmp_path, spoil):
    open_clip_trainer(tmp_path, rule_3)
    saved = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    spoil(saved)
    torch.save(saved, tmp_path / "epoch_1.pt")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    choice = ModelChoice(str(tmp_path / "model.json"))
    with pytest.raises(InputError, match=SPOILED[spoil]):
        convert_checkpoint(
            tmp_path / "epoch_1.pt", tmp_path / "run", "run", choice=choice, optimizer_batch=16
        )
    assert not (tmp_path / "run").exists()
