"""Random models in random files with random damage: features equal to open_clip's, or one error
with its reason and nothing written."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from parallel_clip.convert.choose_model import ModelChoice
from parallel_clip.convert.open import convert_checkpoint
from parallel_clip.engine.groups import Groups
from parallel_clip.errors import InputError
from parallel_clip.evaluate.encoder import load_encoder
from parallel_clip.layout import Layout
from tests import reference
from tests.convert.test_tensor_files import CONTAINERS, DAMAGES
from tests.small_models import image_batch, small_model, token_batch

PREFIXES = ["", "", "module.", "model.", "clip_model.", "_orig_mod.", "module._orig_mod.", "x.y."]
SPOILS = ["", "nan", "", "missing", "extra", "file", "switch", "", "override"]
DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16]


def random_model(draw: random.Random) -> dict:
    pool = draw.choice(["tok", "avg"])
    vision = {
        "layers": draw.choice([1, 2]),
        "head_width": draw.choice([12, 16, 48]),
        "pool_type": pool,
        "final_ln_after_pool": draw.random() < 0.3,
        "no_ln_pre": draw.random() < 0.3,
    }
    text = {
        "layers": draw.choice([1, 3]),
        "heads": draw.choice([1, 2, 8]),
        "pool_type": draw.choice(["argmax", "last", "first"]),
        "no_causal_mask": draw.random() < 0.3,
        "proj_bias": draw.random() < 0.3,
        "vocab_size": 49408,
    }
    for section in (vision, text):
        if draw.random() < 0.3:
            section["ls_init_value"] = 0.3
        if draw.random() < 0.3:
            section["norm_kwargs"] = {"eps": 1e-6}
    model = small_model(vision, text)
    if draw.random() < 0.4:
        model["quick_gelu"] = True
    elif draw.random() < 0.3:
        model["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    if draw.random() < 0.3:
        model |= {"init_logit_scale": 1.0, "init_logit_bias": -3.0}
    if draw.random() < 0.3:
        model["custom_text"] = True
    return model


def switched(model: dict, draw: random.Random) -> dict:
    """The model with one switch of equal shapes in its other position."""
    other = json.loads(json.dumps(model))
    vision, text = other["vision_cfg"], other["text_cfg"]
    kind = draw.randrange(5)
    if kind == 0 and "act_kwargs" not in text:
        other["quick_gelu"] = not model.get("quick_gelu", False)
    elif kind == 1:
        vision["head_width"] = {12: 16, 16: 48, 48: 12}[vision["head_width"]]
    elif kind == 2:
        text["heads"] = {1: 2, 2: 8, 8: 1}[text["heads"]]
    elif kind == 3:
        text["no_causal_mask"] = not text["no_causal_mask"]
    else:
        text["pool_type"] = {"argmax": "last", "last": "first", "first": "argmax"}[
            text["pool_type"]
        ]
    return other


def features(model: dict, weights: dict, inputs: tuple) -> tuple:
    theirs = reference.build_model(model).eval()
    theirs.load_state_dict(weights)
    with torch.no_grad():
        return theirs(*inputs)[:2]


def check(seed: int, folder: Path) -> str:
    """One random case; returns what became of it."""
    draw = random.Random(seed)
    model = random_model(draw)
    dtype, prefix = draw.choice(DTYPES), draw.choice(PREFIXES)
    state = {n: t.to(dtype) for n, t in reference.random_weights(model, seed).items()}
    weights = {n: t.float() for n, t in state.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in state and draw.random() < 0.5:
            state[name] = state[name].reshape(draw.choice([(1,), (1, 1)]))
    spoil = SPOILS[seed % len(SPOILS)]
    if spoil == "nan":
        name = draw.choice(sorted(state))
        state[name] = torch.full_like(state[name], float("nan"))
    elif spoil == "missing":
        del state[draw.choice(sorted(set(state) - {"attn_mask", "text.attn_mask"}))]
    elif spoil == "extra":
        state["more.weight"] = torch.zeros(1)

    source = folder / "source"
    source.mkdir()
    container = draw.choice(sorted(CONTAINERS))
    suffix = ".safetensors" if container == "safetensors" else ".bin"
    name = draw.choice(["open_clip_model", "open_clip_pytorch_model", "model", "mine"]) + suffix
    CONTAINERS[container][1]({prefix + n: t for n, t in state.items()}, source / name)
    if spoil == "file":
        content = (source / name).read_bytes()
        (source / name).write_bytes(DAMAGES[draw.choice(sorted(DAMAGES))](content))
    choice = ModelChoice()
    if draw.random() < 0.7 or spoil in ("switch", "override"):
        (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    named = model
    if spoil in ("switch", "override") or not (source / "open_clip_config.json").exists():
        named = switched(model, draw) if spoil in ("switch", "override") else model
        (folder / "named.json").write_text(json.dumps(named))
        keys = ["quick_gelu", "head_width", "heads", "no_causal_mask", "pool_type"]
        override = keys if spoil == "override" else []
        choice = ModelChoice(str(folder / "named.json"), override)

    fails = spoil in ("nan", "missing", "extra", "file") or spoil == "switch" and named != model
    before = sorted(folder.rglob("*"))
    to = draw.choice(["run", "openclip"])
    if fails:
        with pytest.raises(InputError) as caught:
            convert_checkpoint(source, folder / "target", to, choice=choice)
        assert len(str(caught.value)) > 30 and sorted(folder.rglob("*")) == before
        with pytest.raises(InputError):
            load_encoder(source, model_name=choice.name, override=choice.override)
        return spoil
    convert_checkpoint(source, folder / "target", to, choice=choice)
    inputs = image_batch(named, 2), token_batch(named, 2)
    expected = features(named, weights, inputs)
    for encoder in (
        load_encoder(source, model_name=choice.name, override=choice.override),
        load_encoder(folder / "target"),
    ):
        found = encoder.encode_image(inputs[0]), encoder.encode_text(inputs[1])
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()
    return spoil or "equal"


def check_all(groups: Groups, seeds: range, folder: Path) -> list[str]:
    outcomes = []
    for seed in seeds:
        own = folder / f"seed {seed}"
        own.mkdir()
        outcomes.append(check(seed, own))
        shutil.rmtree(own)
    return outcomes


@pytest.mark.parametrize("seeds", [range(27), pytest.param(range(27, 405), marks=pytest.mark.long)])
def test_equal_features_or_one_error(processes, tmp_path, seeds):
    found = processes.run(Layout(1), check_all, seconds=1800, seeds=seeds, folder=tmp_path)
    seen = set(found[0])
    assert {"equal", "nan", "missing", "extra", "file", "switch", "override"} <= seen
