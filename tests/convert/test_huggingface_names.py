"""The tables of names against transformers' and OpenCLIP's own classes."""

import pytest
import torch
import transformers

from parallel_clip.convert.huggingface import family_of, their_shapes
from parallel_clip.convert.huggingface_config_writer import huggingface_config
from parallel_clip.convert.huggingface_names import Line
from parallel_clip.convert.huggingface_tensors import read_ours, read_theirs
from parallel_clip.errors import InputError
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.known_models import known_names, load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.convert import huggingface_models
from tests.small_models import KINDS


def reason(name: str) -> str | None:
    if name == "ViT-SO400M-16-SigLIP-i18n-256":
        return "text_cfg.proj_bias is off"
    if name == "ViT-M-16-alt":
        return "vision_cfg.ls_init_value is set"
    if "CLIPA" in name:
        return "vision_cfg.pool_type is 'avg'.*no_ln_pre.*no_causal_mask.*'last'"
    if name.startswith(("PE-Core", "MobileCLIP2")):
        return "no trunk of SigLIP's"
    if "worldwide" in name and not name.startswith("ViT-L"):  # XLM-V, whose end is token 2
        return "text_cfg.eos_id is 2, which means pool_type 'argmax'"
    return None


# Of each kind one; the others with -m long.
SHOWN = (
    "ViT-B-32", "ViT-H-14-quickgelu", "ViT-bigG-14", "ViT-L-14-worldwide", "ViT-B-16-SigLIP",
    "ViT-SO400M-14-SigLIP", "ViT-gopt-16-SigLIP2-256",
)  # fmt: skip
EXPRESSIBLE = [name for name in known_names() if reason(name) is None]


def test_most_models_are_expressible():
    assert len(EXPRESSIBLE) == 58


@pytest.mark.parametrize(
    "name",
    [n if n in SHOWN else pytest.param(n, marks=pytest.mark.long) for n in EXPRESSIBLE],
)
def test_a_known_model_has_the_tensors_of_transformers(name):
    architecture = load_architecture(name)
    config = huggingface_config(architecture, "float32")
    config_class = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(
            config_class[config["model_type"]](**config)
        ).state_dict()
    ours = {p.name: p.shape for p in parameter_table(architecture)}
    family = family_of(architecture)
    assert {n for line in family.lines for n in line.ours} == ours.keys()
    found = their_shapes(family, ours)
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("name", [name for name in known_names() if reason(name)])
def test_what_neither_class_can_be_is_told(name):
    with pytest.raises(InputError, match=f"(?s){reason(name)}") as caught:
        huggingface_config(load_architecture(name), "float32")
    assert "--to openclip keeps it" in str(caught.value)


def test_the_image_tower_of_siglip_has_timms_names_in_open_clip():
    """The names on our side of the table are those of open_clip's own state dict."""
    theirs = reference.build_model(KINDS["timm-siglip"]).state_dict()
    family = family_of(architecture_from_json(KINDS["timm-siglip"], "small"))
    assert {n for line in family.lines for n in line.ours} == theirs.keys()


LINES = [
    Line(("a",), ("x", "y", "z")),
    Line(("a", "b"), ("x",)),
    Line(("a", "b"), ("x", "y", "z")),
    Line(("a",), ("x",)),
    Line(("a",), ("x",), "transposed"),
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_read_in_both_directions_to_the_last_bit(line):
    shapes = {"a": (6, 5), "b": (12, 5)} if len(line.ours) > 1 else {"a": (6, 5)}
    ours = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = dict(zip(line.theirs, read_theirs(line, ours.__getitem__), strict=True))
    assert {n: tuple(t.shape) for n, t in theirs.items()} == line.their_shapes(shapes)
    for name, tensor in ours.items():
        assert torch.equal(read_ours(line, name, shapes, theirs.__getitem__), tensor)


def test_queries_keys_and_values_are_in_this_order():
    """By what the tensors do: each of transformers' is at its place in the fused one."""
    model = huggingface_models.build(huggingface_models.CONFIGS["siglip"])
    attention = model.vision_model.encoder.layers[0].self_attn
    line = Line(("qkv",), ("q", "k", "v"))
    parts = {part: getattr(attention, f"{part}_proj").weight for part in "qkv"}
    fused = read_ours(line, "qkv", {"qkv": (144, 48)}, parts.__getitem__)
    x = torch.randn(3, 48)
    for found, part in zip((x @ fused.T).chunk(3, dim=-1), "qkv", strict=True):
        torch.testing.assert_close(found, x @ parts[part].T)
