"""The bias that is measured: where OpenCLIP's sigmoid loss of the same features is smallest."""

import math

import open_clip.loss
import pytest
import torch
from torch.nn.functional import normalize

from parallel_clip.loss import SigLipLoss
from parallel_clip.loss.contrastive import ALONE
from parallel_clip.pipeline.measured_bias import measured_bias


def features(pairs: int, alike: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and texts [pairs, 16] of pairs that are near, all of them with a part in common."""
    generator = torch.Generator().manual_seed(pairs)
    pictures, noise, common = (torch.randn(n, 16, generator=generator) for n in (pairs, pairs, 1))
    texts = pictures + 0.5 * noise
    return normalize(pictures + alike * common), normalize(texts + alike * common)


def measure(pictures, texts, scale, identities=None) -> float:
    loss = SigLipLoss(group=ALONE)
    multiplier = torch.tensor(scale)
    return measured_bias(
        lambda bias: loss(pictures, texts, multiplier, bias, identities=identities), multiplier
    ).item()


@pytest.mark.parametrize("pairs", [2, 64])
@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("alike", [-5.0, 0.0, 5.0])
def test_the_loss_is_smallest_there(pairs, scale, alike):
    pictures, texts = features(pairs, alike)
    bias = measure(pictures, texts, scale)
    theirs = open_clip.loss.SigLipLoss()
    exact = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    theirs(pictures.double(), texts.double(), torch.tensor(scale).double(), exact).backward()
    # The slope next to the minimum, for which a bias that is off by 1e-5 is enough.
    assert abs(exact.grad) < 1e-5 * pairs
    logits = scale * pictures.double() @ texts.double().t() + bias
    assert logits.sigmoid().mean().item() == pytest.approx(1 / pairs, rel=1e-4)


def test_random_features_get_the_logarithm_of_the_odds():
    """The known case: where all cosines are 0 the bias is log(1 / (B - 1))."""
    pictures, texts = torch.eye(64)[:32], torch.eye(64)[32:]
    assert measure(pictures, texts, 100.0) == pytest.approx(-math.log(31), abs=1e-5)


def test_duplicates_take_no_part():
    pictures, texts = features(8, 1.0)
    twice = pictures.repeat(2, 1), texts.repeat(2, 1)
    identities = torch.arange(8).repeat(2)
    logits = 20.0 * pictures.double() @ texts.double().t() + measure(*twice, 20.0, identities)
    others = logits.sigmoid().sum() - logits.diagonal().sigmoid().sum()
    # Of 16 rows, each with its own text and twice those of the seven others.
    assert 2 * (logits.diagonal().sigmoid().sum() + 2 * others) == pytest.approx(16, rel=1e-4)


def test_features_that_are_not_finite_give_none():
    pictures, texts = features(4, 0.0)
    pictures[1, 1] = math.nan
    assert math.isnan(measure(pictures, texts, 10.0))
