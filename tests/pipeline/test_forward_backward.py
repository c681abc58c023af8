"""A step in microbatches against a plain one: OpenCLIP's model and loss over the whole batch."""

import functools
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import open_clip.loss
import pytest
import torch
from torch import Tensor

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.parameters import Parameter
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch
from tests import reference
from tests.loss import test_captions
from tests.pipeline.forward_backward_cases import Way, gradients_sent, steps
from tests.ranks import copies, whole_tensors
from tests.small_models import distance, image_batch, small_model, token_batch

BATCH = 8
WAYS = [Way(m, stash) for m in (1, 2, 4) for stash in sorted({0, m // 2, m})]
LAYOUTS = {
    "data1": Layout(1),
    "data2": Layout(2),
    "tensor2-sequence": Layout(2, tensor=2, sequence=True),
    "data2-tensor2-sequence": Layout(4, tensor=2, sequence=True),
    "pipeline2": Layout(2, pipeline=2),
    "pipeline3": Layout(3, pipeline=3),
    "data2-pipeline2": Layout(4, pipeline=2),
    "tensor2-sequence-pipeline2": Layout(4, tensor=2, pipeline=2, sequence=True),
    "pipeline2-virtual2": Layout(2, pipeline=2, virtual_pipeline=2),
}
# A low scale for the sigmoid loss keeps the gradients of both logit parameters away from zero.
MODELS = {
    "infonce": small_model({"patch_dropout": 0.4, "ls_init_value": 0.3}),
    "sigmoid": small_model({"ls_init_value": 0.3}, init_logit_scale=1.2, init_logit_bias=-2.0),
}


@functools.cache
def inputs(loss: str):
    model_cfg = MODELS[loss]
    vision = architecture_from_json(model_cfg, "small").vision
    kept = None
    if vision.patch_dropout:
        rows = kept_patches_of_batch(0, 1, range(BATCH), vision.patches, vision.patches_kept)
        kept = torch.from_numpy(rows)
    weights = reference.random_weights(model_cfg, seed=6)
    return weights, image_batch(model_cfg, BATCH), token_batch(model_cfg, BATCH), kept


# What is not trained of towers of two layers: whole towers, all but what their last block hands on,
# and norms alone in front of what is trained.
FREEZES = {
    "vision": {"vision": "all"},
    "text": {"text": "all"},
    "both": {"vision": "all", "text": "all"},
    "ends": {"vision": {"unlocked_groups": 2}, "text": {"unlocked_groups": 1}},
    "norms": {"vision": {"unlocked_groups": 2, "norms": True}, "text": {"unlocked_groups": 3}},
}


@functools.cache
def expected(loss: str, freeze: str = "nothing") -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the whole batch and the gradient of every trained parameter, by OpenCLIP."""
    weights, images, tokens, kept = inputs(loss)
    model = reference.build_model(MODELS[loss])
    model.load_state_dict(weights)
    reference.lock_towers(model, FREEZES.get(freeze, {}))
    if kept is not None:
        model.visual.patch_dropout = reference.FedPatchDropout()
        model.visual.patch_dropout.kept = kept
    classes = {"infonce": open_clip.loss.ClipLoss, "sigmoid": open_clip.loss.SigLipLoss}
    value = classes[loss]()(*model(images, tokens))
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return value.item(), gradients


def assert_gradients(
    layout: Layout,
    answers: list[Any],
    way: Way,
    parameters: Sequence[Parameter],
    gradients: Mapping[str, Tensor],
) -> None:
    """Those of each copy of the model, put together from its ranks, are `gradients`."""
    for ranks in copies(layout, answers):
        ours = whole_tensors(parameters, [rank[way][1] for rank in ranks])
        for name, gradient in gradients.items():
            assert distance(ours[name], gradient) < 1e-5, (way, name)


@pytest.mark.parametrize(
    ("loss", "recompute"),
    [("infonce", "none"), ("infonce", "selective"), ("infonce", "full"), ("sigmoid", "none")],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_loss_and_every_gradient_are_the_whole_batchs(processes, layout, loss, recompute):
    weights, images, tokens, kept = inputs(loss)
    # Virtual stages need a microbatch for each rank of the pipeline.
    ways = [way for way in WAYS if layout.virtual_pipeline == 1 or way.microbatches > 1]
    if layout.pipeline > 1:
        ways += [Way(2, 2, loss_on_all_stages=True), Way(4, 0, loss_on_all_stages=True)]
    answers = processes.run(
        layout,
        steps,
        model_cfg=MODELS[loss],
        weights=weights,
        images=images,
        tokens=tokens,
        kept=kept,
        loss=loss,
        ways=ways,
        settings={"recompute": recompute},
    )
    value, gradients = expected(loss)
    table = parameter_table(architecture_from_json(MODELS[loss], "small"))
    assert {p.name for p in table} == gradients.keys()
    for way in ways:
        for answer in answers:
            assert answer[way][0] == pytest.approx(value, rel=1e-5), way
        assert_gradients(layout, answers, way, table, gradients)


CAPTIONS = 3
SEVERAL = [("infonce", "pipeline2", "full", "text")]
SEVERAL_GRID = [
    pytest.param(*case, marks=pytest.mark.long)
    for case in product(MODELS, LAYOUTS, ("none", "full"), (None, *FREEZES))
    if case not in SEVERAL and (case[2:] == ("none", None) or case[0] == "infonce")
]


@pytest.mark.parametrize(("loss", "layout", "recompute", "freeze"), [*SEVERAL, *SEVERAL_GRID])
def test_with_several_texts_a_picture(processes, loss, layout, recompute, freeze):
    """Against the loss in plain torch, of the features of OpenCLIP's model."""
    layout, model_cfg = LAYOUTS[layout], MODELS[loss]
    weights, images, _, kept = inputs(loss)
    tokens = token_batch(model_cfg, CAPTIONS * BATCH)
    ways = [way for way in WAYS if layout.virtual_pipeline == 1 or way.microbatches > 1]
    if layout.pipeline > 1:
        ways.append(Way(4, 0, loss_on_all_stages=True))
    data = {"train": [{"shards": "unused.tar", "caption_lines": True}]}
    settings = {"recompute": recompute, "data": data | {"captions_per_image": CAPTIONS}}
    answers = processes.run(
        layout,
        steps,
        model_cfg=model_cfg,
        weights=weights,
        images=images,
        tokens=tokens,
        kept=kept,
        loss=loss,
        ways=ways,
        settings=settings | ({"freeze": FREEZES[freeze]} if freeze else {}),
    )
    model = reference.build_model(model_cfg)
    model.load_state_dict(weights)
    reference.lock_towers(model, FREEZES.get(freeze, {}))
    if kept is not None:
        reference.feed_patch_dropout(model).kept = kept
    everything = torch.ones(BATCH, CAPTIONS * BATCH, dtype=torch.bool)
    of = {
        "infonce": functools.partial(test_captions.infonce, 0.0, everything, bias=None),
        "sigmoid": functools.partial(test_captions.sigmoid, everything),
    }
    value = of[loss](*model(images, tokens))
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    table = parameter_table(architecture_from_json(model_cfg, "small"))
    trained = [parameter for parameter in table if parameter.name in gradients]
    for way in ways:
        for ranks in copies(layout, answers):
            assert ranks[0][way][0] == pytest.approx(value.item(), rel=1e-5), way
        assert_gradients(layout, answers, way, trained, gradients)


MEASURED = {
    "data2-tensor2-sequence": [Way(2, 1)],
    "tensor2-sequence-pipeline2": [Way(2, 0), Way(2, 2, loss_on_all_stages=True)],
}


@pytest.mark.parametrize("layout", MEASURED)
def test_a_measured_bias_is_that_of_the_whole_batch(processes, layout):
    """Then the probabilities of all logits add up to the pairs, by OpenCLIP's features."""
    weights, images, tokens, _ = inputs("sigmoid")
    model = reference.build_model(MODELS["sigmoid"])
    model.load_state_dict(weights)
    pictures, texts, scale, _ = model.double()(images.double(), tokens)
    logits, low, high = scale * pictures @ texts.t(), -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (logits + middle).sigmoid().sum() < BATCH else (low, middle)
    model.logit_bias.data.fill_(low)
    value = open_clip.loss.SigLipLoss()(pictures, texts, scale, model.logit_bias)
    value.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    assert abs(gradients.pop("logit_bias")) < 1e-9
    ways = [way._replace(measures_bias=True) for way in MEASURED[layout]]
    answers = processes.run(
        LAYOUTS[layout], steps, model_cfg=MODELS["sigmoid"], weights=weights, images=images,
        tokens=tokens, kept=None, loss="sigmoid", ways=ways, settings={},
    )  # fmt: skip
    table = parameter_table(architecture_from_json(MODELS["sigmoid"], "small"))
    for way in ways:
        assert all(a[way][0] == pytest.approx(value.item(), rel=1e-6) for a in answers), way
        for ranks in copies(LAYOUTS[layout], answers):
            ours = whole_tensors(table, [rank[way][1] for rank in ranks])
            assert abs(ours["logit_bias"]) < 1e-5
            for name, gradient in gradients.items():
                assert distance(ours[name], gradient) < 1e-5, (way, name)


FROZEN = [
    ("vision", "pipeline3", "none"),
    ("text", "pipeline2-virtual2", "full"),
    ("ends", "data2-tensor2-sequence", "selective"),
    ("ends", "pipeline3", "full"),
    ("norms", "tensor2-sequence-pipeline2", "selective"),
    ("both", "pipeline2-virtual2", "none"),
]
FROZEN_GRID = [
    pytest.param(*case, marks=pytest.mark.long)
    for case in product(FREEZES, LAYOUTS, ("none", "selective", "full"))
    if case not in FROZEN
]


@pytest.mark.parametrize(("freeze", "layout", "recompute"), [*FROZEN, *FROZEN_GRID])
def test_what_is_trained_has_the_gradients_of_open_clips_locked_model(
    processes, freeze, layout, recompute
):
    layout = LAYOUTS[layout]
    weights, images, tokens, kept = inputs("infonce")
    ways = [way for way in WAYS if layout.virtual_pipeline == 1 or way.microbatches > 1]
    answers = processes.run(
        layout,
        steps,
        model_cfg=MODELS["infonce"],
        weights=weights,
        images=images,
        tokens=tokens,
        kept=kept,
        loss="infonce",
        ways=ways,
        settings={"recompute": recompute, "freeze": FREEZES[freeze]},
    )
    value, gradients = expected("infonce", freeze)
    table = parameter_table(architecture_from_json(MODELS["infonce"], "small"))
    trained = [parameter for parameter in table if parameter.name in gradients]
    for way in ways:
        held = {name for answer in answers for name in answer[way][1]}
        assert held == gradients.keys(), "no gradient but for what is trained"
        for ranks in copies(layout, answers):
            assert ranks[0][way][0] == pytest.approx(value, rel=1e-5), way
        assert_gradients(layout, answers, way, trained, gradients)


@pytest.mark.parametrize(
    ("freeze", "sent"), [({}, 4), (FREEZES["both"], 0), (FREEZES["ends"], 0), (FREEZES["text"], 4)]
)
def test_a_gradient_travels_only_where_something_in_front_is_trained(processes, freeze, sent):
    """Two stages of one layer of each tower."""
    weights, images, tokens, _ = inputs("sigmoid")
    answers = processes.run(
        Layout(2, pipeline=2),
        gradients_sent,
        model_cfg=MODELS["sigmoid"],
        weights=weights,
        images=images,
        tokens=tokens,
        microbatches=4,
        settings={"freeze": freeze},
    )
    assert answers == [0, sent]
