import pytest
import torch
from open_clip_train import scheduler

from parallel_clip.config import LearningRateSchedule
from parallel_clip.training.learning_rate import learning_rate

PEAK, TOTAL = 3e-3, 57


def openclips(make, *arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    adjust = make(optimizer, PEAK, *arguments)
    rates = []
    for step in range(TOTAL):
        adjust(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def ours(**schedule) -> list[float]:
    return [
        learning_rate(step, TOTAL, PEAK, LearningRateSchedule(**schedule)) for step in range(TOTAL)
    ]


@pytest.mark.parametrize("warmup", [0, 1, 10, 56, 57, 200])
def test_cosine_is_openclips(warmup):
    theirs = openclips(scheduler.cosine_lr, warmup, TOTAL) if warmup != TOTAL else None
    if theirs is None:  # OpenCLIP divides by zero only where it leaves warmup, which it does not
        theirs = [PEAK * (step + 1) / warmup for step in range(TOTAL)]
    assert ours(kind="cosine", warmup=warmup) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 10])
def test_constant_is_openclips(warmup):
    theirs = openclips(scheduler.const_lr, warmup, TOTAL)
    assert ours(kind="constant", warmup=warmup) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("warmup, cooldown, min_lr", [(0, 20, 0.0), (10, 30, 1e-4), (10, 47, 0.0)])
def test_wsd_is_openclips_constant_with_cooldown(warmup, cooldown, min_lr):
    theirs = openclips(scheduler.const_lr_cooldown, warmup, TOTAL, cooldown, 1.0, min_lr)
    rates = ours(kind="wsd", warmup=warmup, cooldown=cooldown, min_lr=min_lr)
    assert rates == pytest.approx(theirs, rel=1e-12)


def test_wsd_without_cooldown_is_constant():
    assert ours(kind="wsd", warmup=10) == ours(kind="constant", warmup=10)


def test_cosine_ends_above_min_lr():
    rates = ours(kind="cosine", warmup=5, min_lr=1e-3)
    assert rates[4] == rates[5] == PEAK
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert 1e-3 < rates[-1] < 1.02e-3
