"""Learning rates and weight decay of each parameter, against open_clip's and timm's own methods."""

import pytest
import torch
from timm.optim import param_groups_layer_decay

from parallel_clip.config import Optimizer
from parallel_clip.errors import InputError
from parallel_clip.model.known_models import known_names, load_architecture
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.optimizer.update_rules import UpdateRule, peak_scales, update_rules
from tests.reference import build_model
from tests.small_models import KINDS

PLAIN = architecture_from_json(KINDS["plain"], "plain")
PE_CORE = architecture_from_json(KINDS["timm-pe-core"], "pe-core")


def scales(architecture, **settings) -> dict[str, float]:
    rules = update_rules(architecture, Optimizer(**settings))
    return {name: rule.lr_scale for name, rule in rules.items()}


def decayed(architecture, no_decay) -> set[str]:
    rules = update_rules(architecture, Optimizer(no_decay=no_decay))
    return {name for name, rule in rules.items() if rule.decayed}


def meta_model(kind: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(KINDS[kind])


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-SO400M-14-SigLIP", "PE-Core-B-16"])
def test_by_default_all_is_as_in_open_clip_3(name):
    assert name in known_names()
    rules = update_rules(load_architecture(name), Optimizer()).values()
    assert set(rules) == {UpdateRule(1.0, True), UpdateRule(1.0, False)}


def test_each_part_has_its_peak():
    settings = {"lr": 1e-3, "lr_vision": 2e-3, "lr_text": 0.0, "lr_logit": 5e-4}
    for name, scale in scales(PLAIN, **settings).items():
        tower = 2.0 if name.startswith("visual.") else 0.0
        assert scale == (0.5 if name == "logit_scale" else tower), name
    assert peak_scales(Optimizer(lr=1e-3, lr_text=1e-4)) == {"lr_text": pytest.approx(0.1)}


def test_layers_decay_from_the_projection_to_the_embedding():
    found = scales(PLAIN, lr=1e-3, lr_vision=2e-3, layer_decay=0.5)
    for name, scale in {
        "visual.proj": 2.0,
        "visual.ln_post.bias": 1.0,
        "visual.transformer.resblocks.1.ln_1.weight": 1.0,
        "visual.transformer.resblocks.0.ln_1.weight": 0.5,
        "visual.conv1.weight": 0.25,
        "visual.ln_pre.weight": 0.25,
        "text_projection": 1.0,
        "ln_final.weight": 0.5,
        "transformer.resblocks.0.mlp.c_fc.bias": 0.25,
        "token_embedding.weight": 0.125,
        "logit_scale": 1.0,
    }.items():
        assert found[name] == scale, name


def test_layers_of_one_tower_decay_alone():
    found = scales(PLAIN, layer_decay={"vision": 0.5})
    assert {found[name] for name in found if not name.startswith("visual.")} == {1.0}
    assert found["visual.conv1.weight"] == 0.125


def test_layer_decay_is_timms():
    trunk = meta_model("timm-pe-core").visual.trunk
    names = {id(p): name for name, p in trunk.named_parameters()}
    found = scales(PE_CORE, layer_decay={"vision": 0.75})
    for group in param_groups_layer_decay(trunk, layer_decay=0.75):
        for p in group["params"]:
            assert found[f"visual.trunk.{names[id(p)]}"] == group["lr_scale"]


@pytest.mark.parametrize(
    "kind", ["plain", "siglip", "timm-siglip", "timm-pe-core", "timm-mobile-clip"]
)
def test_open_clip_4_spares_what_its_models_and_timms_name(kind):
    """Its rule: one dimension, or named by `no_weight_decay()` of any module (its
    open_clip_train/optim.py); these methods are in OpenCLIP 3.3 already."""
    model = meta_model(kind)
    spared = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    theirs = {n for n, p in model.named_parameters() if p.ndim > 1 and n not in spared}
    architecture = architecture_from_json(KINDS[kind], kind)
    assert decayed(architecture, "openclip4") == theirs
    assert len(decayed(architecture, "openclip3")) > len(theirs)


def test_patterns_spare_what_they_match_beside_norms_and_biases():
    every = decayed(PLAIN, "openclip3")
    assert decayed(PLAIN, []) == every
    assert every - decayed(PLAIN, ["token_embedding.weight", "*.c_fc.*"]) == {
        "token_embedding.weight",
        *(f"{tower}transformer.resblocks.{i}.mlp.c_fc.weight"
          for tower in ("", "visual.") for i in (0, 1)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*pos_embedding", "positional_embedding"),
        ("visual.class_embeding", "visual.class_embedding"),
        ("*.attn.in_proj.weight", "visual.transformer.resblocks.*.attn.in_proj_weight"),
        ("POSITIONAL*", "positional_embedding"),
    ],
)
def test_a_pattern_without_a_match_is_told_with_names_like_it(pattern, near):
    with pytest.raises(InputError) as caught:
        decayed(PLAIN, ["*bias", pattern])
    message = str(caught.value)
    assert f"optimizer.no_decay: '{pattern}' matches no parameter" in message
    assert near in message and "such as" in message
