"""Initial weights: OpenCLIP's distributions, and the same values whatever the layout."""

import functools
import re
from collections import defaultdict

import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.initialize import initial_value
from parallel_clip.model.openclip_json import architecture_from_json
from tests import reference
from tests.model.clip_cases import initial_weights
from tests.ranks import whole_tensor
from tests.small_models import KINDS, small_model

# Large enough that a standard deviation is known to a few percent.
MODERATE = {
    "embed_dim": 96,
    "vision_cfg": {
        "image_size": 48, "patch_size": 8, "layers": 3, "width": 128, "head_width": 32,
        "mlp_ratio": 3.0, "ls_init_value": 0.1,
    },
    "text_cfg": {
        "context_length": 40, "vocab_size": 800, "width": 96, "heads": 4, "layers": 5,
        "ls_init_value": 0.2,
    },
}  # fmt: skip
SIGLIP = small_model(
    {"no_ln_pre": True, "pool_type": "avg"}, {"proj_bias": True, "pool_type": "last"},
    custom_text=True, init_logit_scale=1.5, init_logit_bias=-7,
)  # fmt: skip


def ours(model_cfg: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    architecture = architecture_from_json(model_cfg, "model")
    return {p.name: initial_value(p, seed) for p in parameter_table(architecture)}


def by_kind(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All layers' tensors of a kind as one: "visual.transformer.resblocks.*.mlp.c_fc.weight"."""
    kinds = defaultdict(list)
    for name, tensor in weights.items():
        kinds[re.sub(r"\.\d+\.", ".*.", name)].append(tensor.reshape(-1).double())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


@functools.cache
def openclips(which: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = reference.build_model({"moderate": MODERATE, "siglip": SIGLIP}[which])
    return by_kind({name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("which, model_cfg", [("moderate", MODERATE), ("siglip", SIGLIP)])
def test_distributions_are_openclips(which, model_cfg):
    mine, theirs = by_kind(ours(model_cfg)), openclips(which)
    assert mine.keys() == theirs.keys()
    for kind, expected in theirs.items():
        values, count = mine[kind], expected.numel()
        if len(expected.unique()) == 1:
            assert torch.equal(values, expected), kind
            continue
        std = float(expected.std())
        # Each of two standard deviations from `count` draws is off by 1/sqrt(2·count) or less.
        assert abs(float(values.std()) / std - 1) < 5 / count**0.5, kind
        assert abs(float(values.mean())) < 5 * std / count**0.5, kind
        if count >= 1000:  # uniform up to sqrt(3) deviations, or normal and beyond 2.5 of them
            uniform = float(expected.abs().max()) < 1.8 * std
            assert (float(values.abs().max()) < 1.8 * std) == uniform, kind


@pytest.mark.parametrize("kind", ["plain", "siglip"])
def test_values_do_not_depend_on_the_layout(processes, kind):
    model_cfg = KINDS[kind]
    table = parameter_table(architecture_from_json(model_cfg, kind))
    expected = ours(model_cfg, seed=5)
    for layout in (Layout(1), Layout(2, tensor=2), Layout(4, tensor=4), Layout(4, tensor=2)):
        ranks = processes.run(layout, initial_weights, model_cfg=model_cfg, seed=5)
        for copy in range(layout.data):
            held = ranks[copy * layout.tensor : (copy + 1) * layout.tensor]
            for parameter in table:
                whole = whole_tensor(parameter, [rank[parameter.name] for rank in held])
                assert torch.equal(whole, expected[parameter.name]), (layout, parameter.name)


def test_each_name_and_each_seed_has_draws_of_its_own():
    first, again, other = ours(MODERATE, 0), ours(MODERATE, 0), ours(MODERATE, 1)
    seen: dict[float, str] = {}
    for name, values in first.items():
        assert torch.equal(values, again[name])
        if len(values.unique()) == 1:  # not drawn
            continue
        assert not torch.equal(values, other[name]), name
        beginning = float(values.reshape(-1)[0]) / float(values.std())
        assert beginning not in seen, f"{name} begins as {seen.get(beginning)}"
        seen[beginning] = name


def test_logit_parameters_begin_as_the_model_says():
    assert ours(SIGLIP)["logit_scale"] == 1.5
    assert ours(SIGLIP)["logit_bias"] == -7
    assert float(ours(MODERATE)["logit_scale"].exp()) == pytest.approx(1 / 0.07)
