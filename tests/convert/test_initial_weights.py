"""The weights that a run begins with, against what open_clip loads into a model of its size."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from parallel_clip.convert.initial_sources import check_towers, open_initial_sources
from parallel_clip.convert.initial_weights import InitialReader, find_initial_weights
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import Architecture, parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.resize_model import with_sizes
from tests import reference
from tests.convert import huggingface_models
from tests.small_models import KINDS, small_model

PLAIN = small_model()
CUSTOM = small_model(custom_text=True)


def architecture(model: dict, name: str = "small") -> Architecture:
    return architecture_from_json(model, name)


def saved(folder: Path, name: str, model: dict, seed: int, *, bare: bool = False) -> str:
    """A folder of OpenCLIP's, or a file that says nothing of itself."""
    reference.make_checkpoint(model, seed, folder / name)
    if bare:
        (folder / name / "open_clip_config.json").unlink()
        return str(folder / name / "open_clip_model.safetensors")
    return str(folder / name)


def start(
    wanted: Architecture,
    whole: str | None = None,
    vision: str | None = None,
    text: str | None = None,
    projection: str = "keep",
    named: Architecture | None = None,
    override: tuple[str, ...] = (),
) -> tuple[dict, list[str]]:
    """All weights that are read (None: random), and what is told."""
    sources = open_initial_sources(whole, vision, text, verify=True)
    for source in sources:
        check_towers(source, wanted, "model.name x", override)
    initial, notes = find_initial_weights(sources, wanted, named or wanted, projection)
    reader = InitialReader(initial, wanted)
    return {p.name: reader.read(p.name) for p in parameter_table(wanted)}, notes


def loaded(model: dict, file: Path) -> dict[str, torch.Tensor]:
    """The state of open_clip's model of a size, once it has loaded a file of another."""
    theirs = reference.build_model(model)
    open_clip.factory.load_checkpoint(theirs, str(file))
    return theirs.state_dict()


def assert_equal(ours: dict, theirs: dict) -> None:
    for name, tensor in ours.items():
        assert tensor is not None and torch.equal(tensor, theirs[name]), name


def resized(model: dict, image_size, context_length: int | None = None) -> dict:
    return with_sizes(architecture(model), image_size, context_length).json


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("kind", ["plain", "siglip", "clipa"])
@pytest.mark.parametrize(
    ("image_size", "length", "grids"),
    [(56, None, "4 x 4 to 7 x 7"), ([24, 41], 20, "4 x 4 to 3 x 5"), (None, 6, ""), (32, None, "")],
)
def test_another_size_is_what_open_clip_loads(tmp_path, kind, image_size, length, grids):
    model = KINDS[kind]
    source = saved(tmp_path, "x", model, seed=1)
    wanted = resized(model, image_size, length)
    ours, notes = start(architecture(wanted), source)
    assert_equal(ours, loaded(wanted, tmp_path / "x/open_clip_model.safetensors"))
    told = [f"vision positions interpolated from {grids} (bicubic, antialias, as OpenCLIP)"]
    was = model["text_cfg"]["context_length"]
    text = [f"text positions interpolated from {was} to {length} (linear, as OpenCLIP)"]
    assert notes == told * bool(grids) + text * (length is not None)


@pytest.mark.parametrize("kind", ["timm-siglip", "timm-pe-core", "timm-pe-core-big"])
def test_a_trunk_of_timm_at_another_size(tmp_path, kind):
    model = KINDS[kind]
    source = saved(tmp_path, "x", model, seed=1)
    wanted = resized(model, [56, 32])
    ours, notes = start(architecture(wanted), source)
    theirs = reference.build_model(model)
    theirs.load_state_dict(reference.load_weights(Path(source)))
    theirs.visual.set_input_size([56, 32])
    assert_equal(ours, theirs.state_dict())
    rotary = "; rotary ones computed for 7 x 4" if "pe-core" in kind else ""
    old = "5 x 3" if kind == "timm-pe-core" else "5 x 5"
    said = f"vision positions interpolated from {old} to 7 x 4 (bicubic, antialias, as timm)"
    assert notes == [said + rotary]


def test_a_grid_of_as_many_patches_is_interpolated_too(tmp_path):
    """OpenCLIP, which compares numbers alone, would take its rows for the new ones."""
    source = saved(tmp_path, "x", small_model({"image_size": [16, 64]}), seed=1)
    ours, notes = start(architecture(PLAIN), source)
    before = reference.load_weights(Path(source))["visual.positional_embedding"]
    assert not torch.equal(ours["visual.positional_embedding"], before)
    assert "from 2 x 8 to 4 x 4" in notes[0]


def test_a_file_that_says_nothing_is_of_the_named_size_or_square(tmp_path):
    wanted = architecture(resized(PLAIN, [16, 24], 20))
    file = saved(tmp_path, "square", small_model({"image_size": 40}), seed=1, bare=True)
    ours, notes = start(wanted, file, named=architecture(PLAIN))
    assert_equal(ours, loaded(wanted.json, Path(file)))
    assert "5 x 5 to 2 x 3" in notes[0] and "13 to 20" in notes[1]

    oblong = small_model({"image_size": [24, 40]})
    file = saved(tmp_path, "oblong", oblong, seed=1, bare=True)
    _, notes = start(wanted, file, named=architecture(oblong))
    assert "3 x 5 to 2 x 3" in notes[0]
    with pytest.raises(InputError, match="15 positions of its vision tower are no square; bring"):
        start(wanted, file, named=architecture(PLAIN))


def test_a_config_that_belongs_to_other_weights_is_told(tmp_path):
    source = saved(tmp_path, "x", small_model({"image_size": 40}), seed=1)
    described = {"model_cfg": PLAIN}
    (tmp_path / "x/open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"17 positions in the vision tower, and .* has 26; bring"):
        start(architecture(PLAIN), source)


# ------------------------------------------------------------------------------------------ towers


@pytest.mark.parametrize("of_vision", [PLAIN, CUSTOM])
@pytest.mark.parametrize("of_text", [PLAIN, CUSTOM])
@pytest.mark.parametrize("wanted", [PLAIN, CUSTOM])
def test_towers_of_two_files_whichever_class_they_are_of(tmp_path, of_vision, of_text, wanted):
    """And the logit parameters of a third, which is of that model, too."""
    vision = saved(tmp_path, "vision", of_vision, seed=1)
    text = saved(tmp_path, "text", of_text, seed=2, bare=True)
    whole = saved(tmp_path, "whole", CUSTOM, seed=3)
    parts = [reference.load_weights(Path(p)) for p in (vision, tmp_path / "text", whole)]

    def expected(name):
        of = 2 if name == "logit_scale" else 0 if name.startswith("visual.") else 1
        short = name.removeprefix("text.")
        return parts[of][short] if short in parts[of] else parts[of][f"text.{short}"]

    ours, _ = start(architecture(wanted), whole, vision, text)
    assert all(torch.equal(tensor, expected(name)) for name, tensor in ours.items())
    ours, _ = start(architecture(wanted), None, vision, None)
    assert {n for n, t in ours.items() if t is not None} == {n for n in ours if "visual." in n}
    ours, _ = start(architecture(wanted), None, None, text)
    assert all((t is None) == (n == "logit_scale" or "visual." in n) for n, t in ours.items())
    ours, _ = start(architecture(wanted), whole, None, text)
    assert torch.equal(ours["visual.proj"], parts[2]["visual.proj"])
    assert all(torch.equal(t, expected(n)) for n, t in ours.items() if "visual." not in n)


def test_what_the_other_tower_is_does_not_matter(tmp_path):
    """Its sizes, its kind, tensors of it that are not known here, a prefix before all of them."""
    model = small_model({"layers": 3}, {"width": 48, "layers": 1, "vocab_size": 50}, embed_dim=24)
    state = reference.random_weights(model, seed=1)
    state = {n: t for n, t in state.items() if "visual." in n} | {"text.something": torch.zeros(1)}
    torch.save({f"module.net.{n}": t for n, t in state.items()}, tmp_path / "x.pt")
    wanted = small_model({"layers": 3, "image_size": 48})
    ours, notes = start(architecture(wanted), vision=str(tmp_path / "x.pt"))
    assert torch.equal(ours["visual.proj"], state["visual.proj"])
    assert "begin with 'net.'" in notes[0] and "4 x 4 to 6 x 6" in notes[1]


def test_a_tower_of_hugging_face(tmp_path):
    config = huggingface_models.clip_config()
    theirs = huggingface_models.save(config, tmp_path / "hf").state_dict()
    text = small_model(text={"layers": 3, "mlp_ratio": 2.25}, quick_gelu=True)
    wanted = architecture(text | {"vision_cfg": text["vision_cfg"] | {"mlp_ratio": 2.0}})
    ours, _ = start(wanted, vision=str(tmp_path / "hf"))
    assert torch.equal(ours["visual.proj"], theirs["visual_projection.weight"].t())
    ours, _ = start(wanted, text=str(tmp_path / "hf"))
    embedding = "text_model.embeddings.position_embedding.weight"
    assert torch.equal(ours["positional_embedding"], theirs[embedding])


WRONG = {
    "width": ({"width": 96}, {}, r"vision tower than .*vision_cfg.width is 96 there and 48 here"),
    "activation": ({"act_kwargs": {"approximate": "tanh"}}, {}, r"override=\[vision_cfg.act_kw"),
    "patch": (
        {"patch_size": 16},
        {},
        r"vision_cfg.patch_size is \[16, 16\] there and \[8, 8\] here. Patches of another size are",
    ),
    "vocabulary": ({}, {"vocab_size": 50}, "text_cfg.vocab_size is 50 there and 101 here"),
    "mask": ({}, {"no_causal_mask": True}, r"override=\[text_cfg.no_causal_mask\] says so"),
    "layers": ({}, {"layers": 3}, "text_cfg.layers is 3 there and 2 here"),
}


@pytest.mark.parametrize("which", WRONG)
def test_another_tower_is_refused(tmp_path, which):
    vision, text, told = WRONG[which]
    source = saved(tmp_path, "x", small_model(vision, text), seed=1)
    key, other = ("vision", "text") if vision else ("text", "vision")
    with pytest.raises(InputError, match=told) as caught:
        start(architecture(PLAIN), **{key: source})
    assert f"(init.{key})" in str(caught.value) and "model.name x has another" in str(caught.value)
    start(architecture(PLAIN), **{other: source})
    file = str(tmp_path / "x/open_clip_model.safetensors")
    (tmp_path / "x/open_clip_config.json").unlink()
    if which in ("activation", "mask"):  # which no shape shows
        start(architecture(PLAIN), **{key: file})
        return
    with pytest.raises(InputError, match=f"not those of the {key} tower of small"):
        start(architecture(PLAIN), **{key: file})


def test_a_switch_may_be_meant(tmp_path):
    source = saved(tmp_path, "x", small_model(quick_gelu=True), seed=1)
    with pytest.raises(InputError, match="quick_gelu is True there and False here"):
        start(architecture(PLAIN), text=source)
    start(architecture(PLAIN), text=source, override=("quick_gelu",))


# ------------------------------------------------------------------------------------- projections

WIDE = small_model(embed_dim=40)


@pytest.mark.parametrize("bare", [False, True])
def test_features_of_another_width_need_new_projections(tmp_path, bare):
    vision = saved(tmp_path, "vision", WIDE, seed=1, bare=bare)
    text = saved(tmp_path, "text", PLAIN, seed=2)
    told = "its vision features are of 40 numbers .embed_dim., and those of small of 24"
    with pytest.raises(InputError, match=rf"{told}. init.projection=new begins"):
        start(architecture(PLAIN), vision=vision, text=text)
    ours, notes = start(architecture(PLAIN), vision=vision, text=text, projection="new")
    assert {n for n, t in ours.items() if t is None} == {"visual.proj", "logit_scale"}
    assert notes == ["visual.proj: random, by init.projection=new"]
    with pytest.raises(InputError, match="vision features are .*; .*its text features are"):
        start(architecture(PLAIN), whole=vision)
    ours, _ = start(architecture(PLAIN), whole=vision, projection="new")
    assert {n for n, t in ours.items() if t is None} == {"visual.proj", "text_projection"}


def test_new_projections_where_the_old_ones_fit(tmp_path):
    source = saved(tmp_path, "x", CUSTOM, seed=1)
    ours, _ = start(architecture(PLAIN), source, projection="new")
    assert {n for n, t in ours.items() if t is None} == {"visual.proj", "text_projection"}
    ours, _ = start(architecture(PLAIN), text=source, projection="new")
    assert ours["text_projection"] is None and ours["ln_final.weight"] is not None


def test_projections_of_another_kind(tmp_path):
    """A matrix, a layer with a bias, timm's head, none at all."""
    linear = small_model(text={"proj_bias": True})
    source = saved(tmp_path, "x", linear, seed=1)
    told = r"another \(text_projection.bias, text_projection.weight\) than .* \(text_projection\)"
    with pytest.raises(InputError, match=told):
        start(architecture(PLAIN), source)
    ours, _ = start(architecture(PLAIN), source, projection="new")
    assert {n for n, t in ours.items() if t is None} == {"text_projection"}

    trunk = KINDS["timm-linear"]["vision_cfg"]
    none = KINDS["timm-siglip"]
    headless = saved(tmp_path, "none", none, seed=1)
    wanted = architecture(KINDS["timm-linear"])
    with pytest.raises(InputError, match="features are of 48 numbers"):
        start(wanted, vision=headless)
    ours, _ = start(wanted, vision=headless, projection="new")
    assert {n for n, t in ours.items() if t is None and "visual." in n} == {
        "visual.head.proj.weight",
        "visual.head.proj.bias",
    }
    with_head = saved(tmp_path, "head", small_model(custom_text=True) | {"vision_cfg": trunk}, 1)
    _, notes = start(architecture(none), vision=with_head, projection="new")
    assert notes == ["its vision features are of 24 numbers (embed_dim), and those of small of 48: "
                     "left out"]  # fmt: skip
    with pytest.raises(InputError, match="small has none in vision; leave it out"):
        start(architecture(none), vision=headless, projection="new")


def test_a_file_of_one_tower_alone_is_told(tmp_path):
    state = {n.removeprefix("visual."): t for n, t in reference.random_weights(PLAIN, 1).items()
             if n.startswith("visual.")}  # fmt: skip
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match="not those of the vision tower of small; it holds 32 tensors"
    ):
        start(architecture(PLAIN), vision=str(tmp_path / "x.safetensors"))
