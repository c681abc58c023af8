"""A step in microbatches against a plain one: OpenCLIP's model and loss over the whole batch."""

import functools

import open_clip.loss
import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.model.architecture import parameter_table
from parallel_clip.model.openclip_json import architecture_from_json
from parallel_clip.model.towers.patch_dropout import kept_patches_of_batch
from tests import reference
from tests.pipeline.forward_backward_cases import Way, steps
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


@functools.cache
def expected(loss: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the whole batch and the gradient of every parameter, by OpenCLIP."""
    weights, images, tokens, kept = inputs(loss)
    model = reference.build_model(MODELS[loss])
    model.load_state_dict(weights)
    if kept is not None:
        model.visual.patch_dropout = reference.FedPatchDropout()
        model.visual.patch_dropout.kept = kept
    classes = {"infonce": open_clip.loss.ClipLoss, "sigmoid": open_clip.loss.SigLipLoss}
    value = classes[loss]()(*model(images, tokens))
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


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
        for ranks in copies(layout, answers):
            ours = whole_tensors(
                table, [gradients_of for _, gradients_of in (r[way] for r in ranks)]
            )
            for name, gradient in gradients.items():
                assert distance(ours[name], gradient) < 1e-5, (way, name)
