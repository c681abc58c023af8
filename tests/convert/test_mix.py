"""`convert --mix`: the weighted mean, against arithmetic on the state dicts of open_clip."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from parallel_clip.convert.choose_model import ModelChoice
from parallel_clip.convert.mix import read_shares
from parallel_clip.convert.open import convert_checkpoint, open_source
from parallel_clip.errors import InputError
from tests import reference
from tests.small_models import small_model

# What a CLIPModel can say too, and a vocabulary of CLIP's, whose tokenizer that takes.
MODEL = small_model(text={"vocab_size": 49408})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three checkpoints of one model, one in each format; a fourth is in bf16."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate("abc"):
        weights = reference.make_checkpoint(MODEL, seed=seed, folder=folder / name)
        weights["logit_scale"] += seed  # is not drawn
        save_file(weights, folder / name / "open_clip_model.safetensors")
    convert_checkpoint(folder / "b", folder / "b_hf", "huggingface")
    convert_checkpoint(folder / "c", folder / "c_run", "run")
    convert_checkpoint(folder / "b", folder / "b_half", "openclip", "bf16")
    return folder


def state(folder):
    """As open_clip loads it, in fp64."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def mean(*parts):
    return {name: sum(share * held[name] for share, held in parts) for name in parts[0][1]}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        finite = torch.isfinite(tensor)  # the causal mask is not a weight
        assert torch.allclose(found[name][finite], tensor[finite], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    "first, mix, expected",
    [
        ("a", [("b", "0.5")], {"a": 0.5, "b": 0.5}),
        ("a", [("b_hf", 0.25), ("c_run", "1/3")], {"a": 5 / 12, "b": 1 / 4, "c": 1 / 3}),
        ("c_run", [("a", 0.9)], {"c": 0.1, "a": 0.9}),
        ("b_half", [("a", 0.3)], {"b_half": 0.7, "a": 0.3}),
        ("a", [("b", 0.4), ("c", 0.6)], {"b": 0.4, "c": 0.6}),
    ],
)
def test_it_is_the_mean_of_the_state_dicts(sources, tmp_path, first, mix, expected):
    mix = [(sources / name, share) for name, share in mix]
    said = convert_checkpoint(sources / first, tmp_path / "mixed", "openclip", mix=mix)
    parts = [(share, state(sources / name)) for name, share in expected.items()]
    assert_close(state(tmp_path / "mixed"), mean(*parts))
    (line,) = [line for line in said if line.startswith("mean of weights: ")]
    for path, _ in mix:
        assert str(path) in line and "logit_scale, a logarithm" in line
    # Of a logarithm, which the mean of the multipliers is not.
    scale = sum(share * held["logit_scale"] for share, held in parts)
    assert state(tmp_path / "mixed")["logit_scale"].item() == pytest.approx(scale.item())


@pytest.mark.parametrize("to", ["huggingface", "run"])
def test_every_format_gets_the_same_mean(sources, tmp_path, to):
    mix = [(sources / "b", 0.3)]
    convert_checkpoint(sources / "a", tmp_path / "openclip", "openclip", mix=mix)
    convert_checkpoint(sources / "a", tmp_path / "other", to, mix=mix)
    one, other = open_source(tmp_path / "openclip"), open_source(tmp_path / "other")
    for name in one.shapes():
        assert torch.equal(one.read(name), other.read(name)), name


def test_rounding_comes_last(sources, tmp_path):
    mix = [(sources / "b", 0.3)]
    for precision in ("fp32", "bf16"):
        convert_checkpoint(sources / "a", tmp_path / precision, "openclip", precision, mix=mix)
    whole, rounded = open_source(tmp_path / "fp32"), open_source(tmp_path / "bf16")
    for name in set(whole.shapes()) - {"logit_scale"}:
        assert torch.equal(whole.read(name).bfloat16(), rounded.read(name)), name
    assert rounded.read("logit_scale").dtype == torch.float32


@pytest.mark.parametrize("share", [0.1, "1/3", 0.5, 0.9, 1])
def test_what_is_the_same_in_all_stays_the_same(sources, tmp_path, share):
    convert_checkpoint(sources / "a", tmp_path / "same", "openclip", mix=[(sources / "a", share)])
    held, own = open_source(tmp_path / "same"), open_source(sources / "a")
    assert all(torch.equal(held.read(name), own.read(name)) for name in held.shapes())


def test_with_a_share_of_one_the_first_only_says_the_model(sources, tmp_path):
    convert_checkpoint(sources / "a", tmp_path / "all", "openclip", mix=[(sources / "b", "1")])
    held, other = open_source(tmp_path / "all"), open_source(sources / "b")
    for name in held.shapes():
        assert torch.equal(held.read(name), other.read(name)), name


@pytest.mark.parametrize(
    "given, shares",
    [
        (["0.5"], (0.5, 0.5)),
        (["1/3", "1/3"], (1 / 3, 1 / 3, 1 / 3)),
        (["0.7", "0.2", "0.1"], (0, 0.7, 0.2, 0.1)),  # as floats they leave 1e-16
        ([0.1] * 10, (0, *[0.1] * 10)),
        ([1e-3], (0.999, 0.001)),
        ([], (1,)),
    ],
)
def test_shares_are_counted_exactly(given, shares):
    found = read_shares(given)
    assert sum(found) == 1 and [float(share) for share in found] == pytest.approx(shares)
    assert (found[0] == 0) == (shares[0] == 0)


@pytest.mark.parametrize(
    "share", ["0", "-0.5", "1.01", "half", "nan", "inf", "1/0", "", "1e999", 2]
)
def test_what_is_no_share_is_refused(sources, tmp_path, share):
    with pytest.raises(InputError, match="is no share of the result"):
        convert_checkpoint(
            sources / "a", tmp_path / "mixed", "openclip", mix=[(sources / "b", share)]
        )
    assert not (tmp_path / "mixed").exists()


REFUSED = {
    "too much": ([("b", 0.6), ("c", 0.5)], {}, "shares of --mix are 1.1 together"),
    "another switch": ([("gelu", 0.5)], {}, "quick_gelu is True there and False here"),
    "other sizes": ([("small", 0.5)], {}, r"text_cfg.layers is 3 there and 2 here"),
    "bare, of other sizes": ([("small/open_clip_model.safetensors", 0.5)], {}, "not those of"),
    "not there": ([("nowhere", 0.5)], {}, "does not exist"),
    "not finite": ([("nan", 0.5)], {}, "visual.proj in .*nan.* is not finite"),
    "an optimizer": (
        [("b", 0.5)], {"to": "run", "optimizer_batch": 8}, "--with-optimizer goes on from the",
    ),
    "averages that are not there": ([("c_run", 0.5)], {"ema": True}, "a has no averages"),
}  # fmt: skip


@pytest.fixture(scope="module")
def others(sources):
    reference.make_checkpoint(MODEL | {"quick_gelu": True}, seed=1, folder=sources / "gelu")
    deeper = small_model(text={"vocab_size": 49408, "layers": 3})
    reference.make_checkpoint(deeper, seed=1, folder=sources / "small")
    (sources / "bare").mkdir()
    bare = sources / "small/open_clip_model.safetensors"
    (sources / "bare/model.safetensors").write_bytes(bare.read_bytes())
    weights = reference.load_weights(sources / "b")
    weights["visual.proj"] = torch.full_like(weights["visual.proj"], torch.nan)
    (sources / "nan").mkdir()
    torch.save(weights, sources / "nan/open_clip_pytorch_model.bin")
    config = (sources / "b/open_clip_config.json").read_text()
    (sources / "nan/open_clip_config.json").write_text(config)
    return sources


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_averaged_is_told_and_nothing_written(others, tmp_path, name):
    mix, options, told = REFUSED[name]
    if name.startswith("bare"):
        mix = [("bare", 0.5)]
    mix = [(others / path, share) for path, share in mix]
    options = {"to": "openclip"} | options
    with pytest.raises(InputError, match=told):
        convert_checkpoint(others / "a", tmp_path / "mixed", mix=mix, **options)
    assert not any(tmp_path.iterdir())


def test_an_override_holds_for_all(others, tmp_path):
    """Of two models with QuickGELU and without: what is named wins."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    choice = ModelChoice(str(tmp_path / "model.json"), ["quick_gelu"])
    convert_checkpoint(
        others / "gelu", tmp_path / "mixed", "openclip", choice=choice, mix=[(others / "a", 0.5)]
    )
    architecture = open_source(tmp_path / "mixed").metadata.architecture
    assert not architecture.json.get("quick_gelu", False)


def test_other_preprocessing_is_named(sources, tmp_path):
    (tmp_path / "b").mkdir()
    for file in (sources / "b").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "b/open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "b/open_clip_config.json").write_text(json.dumps(config))
    said = convert_checkpoint(
        sources / "a", tmp_path / "mixed", "openclip", mix=[(tmp_path / "b", 0.5)]
    )
    assert any("b differs, and is left behind: 32 x 32" in line for line in said)
    assert open_source(tmp_path / "mixed").metadata.preprocess["mean"] != [0.1, 0.2, 0.3]
    said = convert_checkpoint(
        sources / "a", tmp_path / "again", "openclip", mix=[(sources / "b", 0.5)]
    )
    assert not any("left behind" in line for line in said)


def test_the_card_names_sources_and_shares(sources, tmp_path):
    mix = [(sources / "b_hf", 0.25), (sources / "c_run", "1/3")]
    for to in ("openclip", "huggingface"):
        convert_checkpoint(sources / "a", tmp_path / to, to, mix=mix)
        card = (tmp_path / to / "README.md").read_text()
        for name, share in (("a", "0.4167"), ("b_hf", "0.25"), ("c_run", "0.3333")):
            assert f"| {sources.name}/{name} | {share} |" in card and f"/{name}\n" in card
        assert "arxiv.org/abs/2203.05482" in card and "logit_scale" in card
        assert card.count("does not say how it was trained") == 3
        assert str(sources) not in card
