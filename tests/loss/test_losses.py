"""The losses on several ranks against OpenCLIP's in one process over the whole batch."""

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from tests.loss.loss_cases import (
    TwoLinears,
    alone_in_a_group,
    gradients_under_ddp,
    in_half_precision,
)
from tests.small_models import distance

OPENCLIPS = {ClipLoss: open_clip.loss.ClipLoss, SigLipLoss: open_clip.loss.SigLipLoss}
GENERATOR = torch.Generator().manual_seed(0)
IMAGES, TEXTS = torch.randn(2, 12, 10, generator=GENERATOR)
WEIGHTS = torch.randn(2, 10, 8, generator=GENERATOR)


def model_for(loss: type) -> TwoLinears:
    return TwoLinears(*WEIGHTS, logit_bias=loss is SigLipLoss)


@pytest.mark.parametrize("ask_for_dictionary", [False, True], ids=["", "dictionary"])
@pytest.mark.parametrize("loss", OPENCLIPS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ddps_mean_is_the_whole_batchs_gradient(processes, loss, ranks, ask_for_dictionary):
    model = model_for(loss)
    value = OPENCLIPS[loss]()(*(x for x in model(IMAGES, TEXTS) if x is not None))
    value.backward()

    for ours, gradients in processes.run(
        Layout(ranks),
        gradients_under_ddp,
        loss=loss,
        model=model_for(loss),
        images=IMAGES,
        texts=TEXTS,
        ask_for_dictionary=ask_for_dictionary,
    ):
        assert ours == pytest.approx(value.item(), rel=1e-6)
        for name, parameter in model.named_parameters():
            assert distance(gradients[name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("loss", OPENCLIPS)
def test_alone_and_without_a_process_group(loss):
    model, twin = model_for(loss), model_for(loss)
    arguments = [x for x in model(IMAGES, TEXTS) if x is not None]
    theirs = OPENCLIPS[loss]()(*arguments)
    theirs.backward()
    ours = loss()(*twin(IMAGES, TEXTS))
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert distance(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("loss", OPENCLIPS)
def test_alone_among_other_processes(processes, loss):
    images, texts = (F.normalize(side, dim=-1) for side in (IMAGES, TEXTS))
    expected = [loss()(images[own], texts[own], 10.0).item() for own in (slice(5), slice(5, 12))]
    found = processes.run(Layout(2), alone_in_a_group, loss=loss, images=images, texts=texts)
    assert found == expected


def test_infonce_with_a_bias_is_openclips():
    """The bias moves every logit of a row alike, so loss and gradients do not see it."""
    model = TwoLinears(*WEIGHTS, logit_bias=True)
    images, texts, scale, bias = model(IMAGES, TEXTS)
    loss = ClipLoss()(images, texts, scale, bias)
    assert loss.item() == pytest.approx(open_clip.loss.ClipLoss()(images, texts, scale).item())
    loss.backward()
    assert abs(model.logit_bias.grad) < 1e-6


@pytest.mark.parametrize("loss", OPENCLIPS)
def test_half_precision_features_have_an_fp32_loss(processes, loss):
    features = F.normalize(IMAGES, dim=-1)
    rounded = features.bfloat16().float()
    expected = loss()(rounded, rounded, torch.tensor(50.0), torch.tensor(-1.0)).item()
    for value, dtype, grad_dtype in processes.run(
        Layout(2), in_half_precision, loss=loss, features=features
    ):
        assert value == pytest.approx(expected, rel=1e-6)
        assert (dtype, grad_dtype) == (torch.float32, torch.bfloat16)
