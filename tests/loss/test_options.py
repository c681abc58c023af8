"""Duplicates and label smoothing, on real ranks, against plain torch in fp64 in this process.

Its cross-entropy with a mask is that of torch's own on each row without what takes no part.
Tolerances are those of test_exact.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from tests.loss.loss_cases import IDENTITIES, Answer, Case, Sent, answers, counts, whole_batch
from tests.loss.test_exact import LAYOUTS, check

PAIRS = 11
# Logits kept, in tiles of a column, of some that do not divide, and streamed.
WAYS = (("auto", "auto"), ("gather", 1), ("gather", 7), ("ring", 1), ("ring", 7), ("ring", 1000))
SMOOTHINGS = (0.0, 0.1, 0.7)
# Allowed beside, times the scale: where a pair's own logit is the only one that takes part, the
# loss is 0, and what smoothing subtracts from the logit is its equal but for rounding.
EPS = torch.finfo(torch.float32).eps


def cases_for(layout: Layout) -> list[Case]:
    """Each way with each kind of identities; features, width, scale and smoothing change from case
    to case, and from layout to layout which smoothing a case has. Where all identities differ, also
    without any."""
    shift, found = LAYOUTS.index(layout), []
    for number, (way, identities) in enumerate(product(WAYS, IDENTITIES)):
        features = ("random", "nearly aligned", "aligned")[number % 3]
        width, scale = (32, 100)[number % 2], (20.0, 100.0, 1.0)[number // 2 % 3]
        dtype = torch.bfloat16 if number % 5 == 4 else torch.float32
        setting = features, PAIRS, width, scale, dtype, *way, identities
        of_setting = [Case(ClipLoss, *setting, SMOOTHINGS[(number + shift) % 3])]
        if (number // 6 + number + shift) % 3 == 0:
            of_setting.append(Case(SigLipLoss, *setting))
        found += of_setting
        if identities == "all differ":
            found += [case._replace(identities=None) for case in of_setting]
    large = "random", 301, 48, 100.0, torch.float32
    tiles = ("auto", "auto"), ("gather", 256)
    return found + [
        Case(ClipLoss, *large, *tiles[shift % 2], "some", 0.2),
        Case(SigLipLoss, *large, *tiles[shift % 2], "some"),
    ]


def kept(case: Case, ranks: int) -> Tensor:
    """Which logits take part: bool [B, B]."""
    count = case.pairs * ranks
    if case.identities is None:
        return torch.ones(count, count, dtype=torch.bool)
    identities = IDENTITIES[case.identities](case.pairs, ranks)
    return (identities[:, None] != identities) | torch.eye(count, dtype=torch.bool)


def infonce(smoothing: float, kept: Tensor, images, texts, scale, bias) -> Tensor:
    logits = scale * images @ texts.T
    return sum(cross_entropy(smoothing, kept, matrix) for matrix in (logits, logits.T)) / 2


def cross_entropy(smoothing: float, kept: Tensor, logits: Tensor) -> Tensor:
    """The mean over rows of each one's cross-entropy among its logits that are `kept`."""
    logs = logits.masked_fill(~kept, -torch.inf).log_softmax(dim=1)
    spread = logs.masked_fill(~kept, 0).sum(dim=1) / kept.sum(dim=1)
    return -((1 - smoothing) * logs.diagonal() + smoothing * spread).mean()


def sigmoid(kept: Tensor, images, texts, scale, bias) -> Tensor:
    logits = scale * images @ texts.T + bias
    labels = torch.eye(len(logits), dtype=logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits[kept], labels[kept], reduction="sum")
    return terms / len(logits)


def formula_of(case: Case, ranks: int) -> Callable[..., Tensor]:
    if case.loss is SigLipLoss:
        return partial(sigmoid, kept(case, ranks))
    return partial(infonce, case.smoothing, kept(case, ranks))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_the_reference_is_torchs_cross_entropy_without_what_takes_no_part(smoothing):
    case = Case(ClipLoss, "random", 20, 16, 20.0, torch.float32, identities="some")
    images, texts = (x.double() for x in whole_batch(case, 1))
    logits, mask = 20 * images @ texts.T, kept(case, 1)
    assert len(set(mask.sum(dim=1).tolist())) > 1
    losses = [
        F.cross_entropy(row[takes_part], takes_part[:own].sum(), label_smoothing=smoothing)
        for own, (row, takes_part) in enumerate(zip(logits, mask, strict=True))
    ]
    found = cross_entropy(smoothing, mask, logits)
    assert torch.isclose(found, torch.stack(losses).mean(), rtol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.data}x{x.tensor}")
def test_loss_and_gradients(processes, layout):
    cases = cases_for(layout)
    by_rank = processes.run(layout, answers, cases=cases)
    found = dict(zip(cases, zip(*by_rank, strict=True), strict=True))
    wrong = [
        f"{case[1:]}: {complaint}"
        for case, ranks in found.items()
        for complaint in check(case, layout, ranks, (formula_of(case, layout.data),) * 2, EPS)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases\n" + "\n".join(wrong[:40])
    for case, ranks in found.items():
        if case.identities == "all differ":
            without = found[case._replace(identities=None)]
            assert all(map(same_bits, ranks, without)), case


def test_identities_cost_one_message(processes):
    """Of [b] numbers over the data group, and no product; a batch with duplicates no more."""
    cases = [
        Case(loss, "random", PAIRS, 32, 20.0, torch.float32, *way)
        for loss in (ClipLoss, SigLipLoss)
        for way in (("auto", "auto"), ("ring", 7))
    ]
    cases += [case._replace(identities=name) for name in ("all differ", "some") for case in cases]
    for found in processes.run(Layout(4, tensor=2), counts, cases=cases):
        flops, sent = zip(*found, strict=True)
        one_more = Sent("data", "all_gather_single", (PAIRS, 1), torch.int64)
        for number in range(4):
            assert flops[number] == flops[number + 4] == flops[number + 8]
            first, *others = sent[number]  # the check of shapes
            assert sent[number + 4] == sent[number + 8] == [first, one_more, *others]


def same_bits(one: Answer, other: Answer) -> bool:
    return all(map(torch.equal, one[:-1], other[:-1]))
