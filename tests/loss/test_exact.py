"""Losses and gradients, over data ranks and helpers, against the formulas in fp64.

No error may be above the largest of: 2e-6 of the reference's norm, twice the error that OpenCLIP's
formulas have in plain fp32 on the same features, and 1e-7 · scale² / B. Gradients are taken as
vectors: all pictures of the batch, all texts, the scale, the bias.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from tests.loss.loss_cases import BIAS, FEATURES, Answer, Case, answers, whole_batch

LAYOUTS = [
    Layout(1), Layout(2), Layout(3), Layout(4),
    Layout(2, tensor=2), Layout(4, tensor=2), Layout(3, tensor=3),
]  # fmt: skip
WIDTHS = (32, 48, 100, 513, 1280)
# With 11 pairs a rank: tiles of a column, of some that do not divide, of more than there are.
WAYS = (
    ("auto", "auto"), ("gather", 1), ("gather", 7), ("gather", 1000),
    ("ring", 1), ("ring", 7), ("ring", 1000),
)  # fmt: skip
SETTINGS = [
    (features, scale, dtype)
    for features in FEATURES
    for scale in (1.0, 20.0, 100.0)
    for dtype in (torch.float32, torch.bfloat16)
]
PAIRS = 11


def cases_for(loss: type, layout: Layout) -> list[Case]:
    """Every kind of features with every scale and dtype; the way and width change from layout to
    layout, so that each meets every way in one of them."""
    shift = LAYOUTS.index(layout)
    by_setting = [
        Case(loss, features, PAIRS, WIDTHS[(i + shift) % 5], scale, dtype, *WAYS[(i + shift) % 7])
        for i, (features, scale, dtype) in enumerate(SETTINGS)
    ]
    few = [Case(loss, "random", pairs, 48, 20.0, torch.float32) for pairs in (1, 2, 3)]
    many = [
        Case(loss, features, 301, 48, scale, torch.float32, exchange, tile)
        for features, scale, exchange, tile in (
            ("random", 100.0, "auto", "auto"),
            ("nearly aligned", 20.0, "gather", 256),
            ("nearly aligned", 100.0, "ring", "auto"),
        )
    ]
    return by_setting + few + many


def infonce(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Radford et al. (2021), figure 3. The bias moves every logit alike and is not seen."""
    logits = scale * images @ texts.T
    own = logits.diagonal()
    return ((logits.logsumexp(1) - own).mean() + (logits.logsumexp(0) - own).mean()) / 2


def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. (2023), algorithm 1."""
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(images), dtype=logits.dtype) - 1
    return torch.log1p(torch.exp(-signs * logits)).sum() / len(images)


def openclips_infonce(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels = torch.arange(len(images))
    per_image, per_text = scale * images @ texts.T, scale * texts @ images.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def openclips_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * images @ texts.T + bias
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


FORMULAS = {ClipLoss: (infonce, openclips_infonce), SigLipLoss: (sigmoid, openclips_sigmoid)}


def with_gradients(formula, features: tuple[Tensor, Tensor], scale: float, dtype) -> list[Tensor]:
    """The loss and the gradients of pictures, texts, scale and bias, in fp64."""
    arguments = [x.to(dtype).requires_grad_() for x in features]
    arguments += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, BIAS)]
    value = formula(*arguments)
    found = torch.autograd.grad(value, arguments, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    return [value.detach().double(), *(zero if x is None else x.double() for x in found)]


def check(
    case: Case, layout: Layout, ranks: list[Answer], formulas: tuple, absolute: float = 0.0
) -> list[str]:
    """What is wrong with what the ranks answered; `formulas`: the exact one, and the plain one;
    absolute: an error that is allowed for each unit of the scale."""
    features = whole_batch(case, layout.data)
    expected, plain = (
        with_gradients(formula, features, case.scale, dtype)
        for formula, dtype in zip(formulas, (torch.float64, torch.float32), strict=True)
    )
    places = [layout.coordinates(rank) for rank in range(layout.world)]
    wrong = []
    for helper in range(layout.tensor):
        own = [a for a, place in zip(ranks, places, strict=True) if place.tensor == helper]
        # Times the number of ranks, so that DDP's mean is the gradient of the whole batch.
        images = torch.cat([a.images.double() for a in own]) / layout.data
        texts = torch.cat([a.texts.double() for a in own]) / layout.data
        found = own[0].loss, images, texts, own[0].scale, own[0].bias
        for name, ours, theirs, exact in zip(Answer._fields, found, plain, expected, strict=False):
            relative = 2e-6
            if case.dtype is torch.bfloat16 and name in ("images", "texts"):
                relative = 2**-8
            allowed = max(
                relative * exact.norm(),
                2 * (theirs - exact).norm(),
                torch.finfo(torch.float32).eps * case.scale**2 / len(features[0]),
                torch.tensor(absolute * case.scale),
            )
            error = (ours.double() - exact).norm()
            if not error <= allowed:
                wrong.append(f"{name}: off by {error:.3g} > {allowed:.3g} of {exact.norm():.3g}")
    for answer in ranks:
        if not all(torch.equal(getattr(answer, x), getattr(ranks[0], x))
                   for x in ("loss", "scale", "bias")):  # fmt: skip
            wrong.append("loss, scale or bias gradient not the same on every rank")
        if not answer.again:
            wrong.append("not the same bits when called again")
        if answer.loss.dtype != torch.float32 or answer.images.dtype != case.dtype:
            wrong.append("dtypes")
    return wrong


@pytest.mark.parametrize("loss", FORMULAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.data}x{x.tensor}")
def test_loss_and_gradients(processes, layout, loss):
    cases = cases_for(loss, layout)
    by_rank = processes.run(layout, answers, cases=cases)
    wrong = [
        f"{case[1:]}: {complaint}"
        for case, *ranks in zip(cases, *by_rank, strict=True)
        for complaint in check(case, layout, ranks, FORMULAS[case.loss])
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases\n" + "\n".join(wrong[:40])
