"""Names behind prefixes and wrappers, and what is said where they do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from parallel_clip.convert.model_weights import ModelWeights
from parallel_clip.convert.open import open_source
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.small_models import small_model

MODEL = small_model()
ARCHITECTURE = architecture_from_json(MODEL, "small")
STATE = reference.random_weights(MODEL, seed=1)


def saved(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return open_source(path)


PREFIXES = ["module.", "_orig_mod.", "model.", "clip_model.", "module.model.", "a.b.c."]


@pytest.mark.parametrize("container", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_left_out(tmp_path, prefix, container):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    weights = ModelWeights(saved(tmp_path / container, state), ARCHITECTURE)
    assert all(torch.equal(weights.read(name), STATE[name]) for name in STATE)
    said = prefix.replace("module.", "").replace("_orig_mod.", "")
    assert bool(said) == bool(weights.notes)
    assert not said or repr(said) in weights.notes[0]


def test_wrappers_within_names_are_left_out(tmp_path):
    def wrapped(name):
        name = name.replace("resblocks.1.", "resblocks.1._fsdp_wrapped_module.")
        name = name.replace("visual.", "visual._orig_mod.").replace(
            "resblocks.0.", "resblocks.0._checkpoint_wrapped_module."
        )
        return f"_fsdp_wrapped_module.{name}"

    state = {wrapped(name): tensor for name, tensor in STATE.items()}
    weights = ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)
    assert all(torch.equal(weights.read(name), STATE[name]) for name in STATE)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_logit_parameters_of_any_shape_of_one(tmp_path, shape):
    state = STATE | {"logit_scale": STATE["logit_scale"].reshape(shape)}
    weights = ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)
    assert torch.equal(weights.read("logit_scale"), STATE["logit_scale"])


def test_a_logit_scale_of_two_values_is_refused(tmp_path):
    state = STATE | {"logit_scale": torch.zeros(2)}
    with pytest.raises(InputError, match=r"logit_scale is \[2\], not \[\]"):
        ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)


MISFITS = {
    "a second model": (
        STATE | {f"teacher.{name}": tensor for name, tensor in STATE.items()},
        [
            f"not part of the model: teacher.ln_final.bias, .* and {len(STATE) - 3} more",
            "more than one model",
        ],
    ),
    "two models with prefixes": (
        {f"{p}.{name}": tensor for p in ("student", "teacher") for name, tensor in STATE.items()},
        ["it holds 124 tensors", "more than one model: save the state dict of one alone"],
    ),
    "two names for one": (
        STATE | {"module.logit_scale": STATE["logit_scale"]},
        ["holds two models: module.logit_scale beside logit_scale"],
    ),
    "context length": (
        STATE | {"positional_embedding": torch.zeros(20, 32)},
        [r"positional_embedding is \[20, 32\], not \[13, 32\]", "text_cfg.context_length is 20"],
    ),
    "a bias": (
        STATE | {"logit_bias": torch.zeros(())},
        ["not part of the model: logit_bias", "loss.kind=sigmoid", "init_logit_bias"],
    ),
    "an image tower alone": (
        {name: tensor for name, tensor in STATE.items() if name.startswith("visual.")},
        ["it holds 32 tensors", "missing: logit_scale, token_embedding.weight", "has to name"],
    ),
    "something else": (
        {"fc.weight": torch.zeros(2, 2)},
        [
            "it holds 1 tensor \\(fc.weight\\)",
            "missing: logit_scale",
            "part of the model: fc.weight",
        ],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told(tmp_path, name):
    state, told = MISFITS[name]
    with pytest.raises(InputError) as caught:
        ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)
    for words in told:
        assert caught.match(words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    state["visual.proj"] = state["visual.proj"].clone()
    state["visual.proj"][0, 1] = value
    weights = ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)
    with pytest.raises(InputError, match="visual.proj in .*x.pt is not finite: 1 of its 1,152"):
        weights.read("visual.proj")


def test_what_fp32_cannot_hold_is_told(tmp_path):
    state = STATE | {"visual.proj": torch.full((48, 24), 1e300, dtype=torch.float64)}
    weights = ModelWeights(saved(tmp_path / "x.pt", state), ARCHITECTURE)
    with pytest.raises(
        InputError, match=r"visual.proj .* values up to 1e\+300, .* infinite in fp32"
    ):
        weights.read("visual.proj")


def test_quantized_weights_are_refused(tmp_path):
    state = STATE | {"visual.proj": torch.zeros(48, 24, dtype=torch.int8)}
    weights = ModelWeights(saved(tmp_path / "x.safetensors", state), ARCHITECTURE)
    with pytest.raises(InputError, match="visual.proj .* is of torch.int8"):
        weights.read("visual.proj")
