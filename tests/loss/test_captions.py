"""Several captions a picture, on real ranks, against plain torch in fp64 in this process.

B pictures have k texts each, text i·k + j that of picture i. Tolerances are those of test_exact.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_clip.layout import Layout
from parallel_clip.loss import ALONE, ClipLoss, SigLipLoss
from parallel_clip.loss.exchange_plan import peak_loss_bytes, plan_exchange
from tests.loss import test_exact, test_options
from tests.loss.loss_cases import BIAS, IDENTITIES, Case, answers, whole_batch
from tests.loss.test_exact import LAYOUTS, check
from tests.loss.test_loss_memory import peak_bytes

PAIRS = 11
ALWAYS = Layout(1), Layout(3), Layout(4, tensor=2)  # the others where there is more time
# Logits kept, in tiles of one picture's texts, of some that do not divide, and streamed.
WAYS = (("auto", "auto"), ("gather", 1), ("gather", 7), ("ring", 1), ("ring", 7), ("ring", 1000))
# A picture's own texts share identities in "in twos", and texts of two pictures in most others.
SHARED = (None, "some", "in twos", "the same place on every rank", "all equal", "a whole rank")


def cases_for(layout: Layout) -> list[Case]:
    """Each way with each second kind of identities, in the next layout the others; the rest changes
    from case to case."""
    found, captions, smoothings = [], cycle((2, 5, 3)), cycle((0.0, 0.1, 0.0, 0.7, 0.2))
    for number, way in enumerate(WAYS):
        first = (number + LAYOUTS.index(layout)) % 2
        for shift, identities in list(enumerate(SHARED))[first::2]:
            features = ("random", "nearly aligned", "aligned")[(number + shift) % 3]
            scale = (20.0, 100.0, 1.0)[(shift + layout.world) % 3]
            dtype = torch.bfloat16 if shift == 4 else torch.float32
            setting = features, PAIRS, 32, scale, dtype, *way, identities
            loss = SigLipLoss if (number + shift + layout.data) % 3 == 0 else ClipLoss
            smoothing = next(smoothings) if loss is ClipLoss else 0.0
            found.append(Case(loss, *setting, smoothing, next(captions)))
    return found


def own_texts(pictures: int, captions: int) -> Tensor:
    """Which texts are a picture's own: bool [B, B·k]."""
    return torch.eye(pictures, dtype=torch.bool).repeat_interleave(captions, dim=1)


def kept(case: Case, ranks: int) -> Tensor:
    """Which logits take part: bool [B, B·k]."""
    own = own_texts(case.pairs * ranks, case.captions)
    if case.identities is None:
        return torch.ones_like(own)
    identities = IDENTITIES[case.identities](case.pairs * case.captions, ranks)
    of_pictures = identities.view(-1, case.captions)
    return own | (of_pictures[:, :, None] != identities).all(dim=1)


def cross_entropy(smoothing: float, kept: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
    """The mean over rows of each one's cross-entropy with probabilities among its logits that are
    `kept`."""
    logs = logits.masked_fill(~kept, -torch.inf).log_softmax(dim=1).masked_fill(~kept, 0)
    targets = (1 - smoothing) * targets + smoothing / kept.to(logits).sum(dim=1, keepdim=True)
    return -(targets * logs).sum(dim=1).mean()


def infonce(smoothing: float, kept: Tensor, images, texts, scale, bias) -> Tensor:
    logits, captions = scale * images @ texts.T, len(texts) // len(images)
    own = own_texts(len(images), captions).to(logits.dtype)
    to_texts = cross_entropy(smoothing, kept, own / captions, logits)
    return (to_texts + cross_entropy(smoothing, kept.T, own.T, logits.T)) / 2


def sigmoid(kept: Tensor, images, texts, scale, bias) -> Tensor:
    logits = scale * images @ texts.T + bias
    labels = own_texts(len(images), len(texts) // len(images)).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits[kept], labels[kept], reduction="sum")
    return terms / len(texts)


def formula_of(case: Case, ranks: int) -> Callable[..., Tensor]:
    if case.loss is SigLipLoss:
        return partial(sigmoid, kept(case, ranks))
    return partial(infonce, case.smoothing, kept(case, ranks))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_reference_is_torchs_cross_entropy_without_what_takes_no_part(smoothing):
    case = Case(ClipLoss, "random", 20, 16, 20.0, torch.float32, identities="some", captions=3)
    images, texts = (x.double() for x in whole_batch(case, 1))
    logits, mask, own = 20 * images @ texts.T, kept(case, 1), own_texts(20, 3).double() / 3
    assert len(set(mask.sum(dim=1).tolist())) > 1
    losses = [
        F.cross_entropy(row[part], target[part], label_smoothing=smoothing)
        for row, part, target in zip(logits, mask, own, strict=True)
    ]
    found = cross_entropy(smoothing, mask, own, logits)
    assert torch.isclose(found, torch.stack(losses).mean(), rtol=1e-13)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if each in ALWAYS else pytest.mark.long) for each in LAYOUTS],
    ids=lambda x: f"{x.data}x{x.tensor}",
)
def test_loss_and_gradients(processes, layout):
    cases = cases_for(layout)
    by_rank = processes.run(layout, answers, cases=cases)
    wrong = [
        f"{case[1:]}: {complaint}"
        for case, *ranks in zip(cases, *by_rank, strict=True)
        for complaint in check(
            case, layout, ranks, (formula_of(case, layout.data),) * 2, test_options.EPS
        )
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases\n" + "\n".join(wrong[:40])


@pytest.mark.parametrize("formula", [ClipLoss, SigLipLoss])
def test_a_caption_that_is_there_k_times_trains_as_once(formula):
    """The loss of one caption, and log k / 2 for the choice among equal ones in InfoNCE's rows."""
    case = Case(formula, "random", 20, 16, 20.0, torch.float32)
    features = whole_batch(case, 1)
    value, *gradients = test_exact.with_gradients(
        test_exact.FORMULAS[formula][0], features, case.scale, torch.float64
    )
    images, texts, scale, bias = (
        x.clone().requires_grad_()
        for x in (*features, torch.tensor(case.scale), torch.tensor(BIAS))
    )
    loss = formula(group=ALONE, captions_per_image=4)
    found = loss(images, texts.repeat_interleave(4, dim=0), scale, bias)
    found.backward()
    more = torch.tensor(4.0).log() / 2 if formula is ClipLoss else 0.0
    assert torch.isclose(found.double(), value + more, rtol=1e-6)
    for ours, theirs in zip((images, texts, scale, bias), gradients, strict=True):
        assert torch.allclose(ours.grad.double(), theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("exchange, tile", [("auto", "auto"), ("ring", "auto")])
@pytest.mark.parametrize("pairs, ranks, width", [(256, 8, 512), (4096, 64, 512)])
def test_memory_is_within_the_bound(pairs, ranks, width, exchange, tile, loss):
    plan = plan_exchange(exchange, tile, pairs, width, ranks, 1, 5)
    assert plan.tile % 5 == 0
    peak = peak_bytes(loss, pairs, ranks, width, plan, torch.float32, options=True, captions=5)
    assert peak <= peak_loss_bytes(plan, pairs, width, ranks, 1, 5)


def test_wrong_shapes_are_told():
    loss = ClipLoss(group=ALONE, captions_per_image=3)
    expected = r"expected \[pictures, width\] and \[3 · pictures, width\]"
    for texts in (torch.zeros(4, 8), torch.zeros(11, 8), torch.zeros(12, 7)):
        with pytest.raises(ValueError, match=expected):
            loss(torch.zeros(4, 8), texts, 1.0)
    with pytest.raises(ValueError, match="one of torch.int64 for each of the 12 texts"):
        loss(torch.zeros(4, 8), torch.zeros(12, 8), 1.0, identities=torch.arange(4))
    with pytest.raises(ValueError, match="captions_per_image 0: expected 1 or more"):
        ClipLoss(captions_per_image=0)
