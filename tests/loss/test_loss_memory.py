"""Memory of the losses at sizes that no test machine holds, counted on fake tensors.

What counts is every storage made inside the loss and still alive, the returned gradients included
and the features not; b × D fp32 numbers are the unit of a rank's own features.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from parallel_clip.engine.fake_world import fake_rank
from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from parallel_clip.loss.contrastive import LossCall
from parallel_clip.loss.duplicates import Duplicates, find_duplicates
from parallel_clip.loss.exchange import LossGroups, TextShards
from parallel_clip.loss.exchange_plan import ExchangePlan, peak_loss_bytes, plan_exchange
from parallel_clip.plan.peak_bytes import PeakBytes

FP32 = 4
MANY_CHUNKS = 40
SIZES = [
    (pairs, ranks, width)
    for pairs in (1024, 16384)
    for ranks in (2, 8, 64)
    for width in (512, 1280)
]
LOSSES = {"infonce": ClipLoss, "sigmoid": SigLipLoss}


@contextmanager
def first_and_last_chunks():
    """Of many equal chunks, a few and the last: fake work takes time too."""
    every_chunk = TextShards.chunks

    def some(texts):
        chunks = list(every_chunk(texts))
        yield from chunks if len(chunks) <= MANY_CHUNKS else (*chunks[:3], chunks[-1])

    with mock.patch.object(TextShards, "chunks", some):
        yield


def peak_bytes(
    loss: str,
    pairs: int,
    ranks: int,
    width: int,
    plan: ExchangePlan,
    dtype,
    options: bool = False,
    captions: int = 1,
) -> int:
    """options: with duplicates and, where the loss has it, label smoothing."""
    build, everyones = LOSSES[loss], pairs * ranks * captions
    smoothing = {"label_smoothing": 0.1} if options and loss == "infonce" else {}
    with fake_rank(Layout(ranks)) as groups, first_and_last_chunks():
        images, texts = (torch.empty(n, width, dtype=dtype) for n in (pairs, pairs * captions))
        scale = torch.tensor(100.0)
        with PeakBytes(images, texts, scale) as counted:
            duplicates = None
            if options:
                sizes = (pairs, captions), (everyones,), (everyones,), (everyones + 1,)
                duplicates = Duplicates(*(torch.empty(n, dtype=torch.int64) for n in sizes))
            call = LossCall(LossGroups(groups.data), plan, True, duplicates)
            built = build(captions_per_image=captions, **smoothing)
            answer = built._compute(images, texts, scale, scale, call)
        assert answer[1].images.shape == (pairs, width)
    return counted.peak


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pairs, ranks, width", SIZES)
def test_gathered(pairs, ranks, width, dtype, loss):
    """All texts and their gradients, four times the own features, and three tiles."""
    tile = plan_exchange("ring", "auto", pairs, width, ranks, 1).tile
    plan = plan_exchange("gather", tile, pairs, width, ranks, 1)
    assert plan.gathered and not plan.stored
    everyones = pairs * ranks
    allowed = 2 * everyones * width + 4 * pairs * width + 3 * pairs * tile + 16 * everyones
    assert peak_bytes(loss, pairs, ranks, width, plan, dtype) <= allowed * FP32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pairs, ranks, width", SIZES)
def test_streamed(pairs, ranks, width, dtype, loss):
    """A few times the own features, however many ranks there are."""
    plan = plan_exchange("ring", "auto", pairs, width, ranks, 1)
    peak = peak_bytes(loss, pairs, ranks, width, plan, dtype)
    assert peak < 14.3 * pairs * width * FP32


@pytest.mark.parametrize("pairs, ranks", [(256, 8), (1024, 2)])
def test_kept_logits_take_no_more_than_gathered_texts(pairs, ranks):
    width = 512
    plan = plan_exchange("auto", "auto", pairs, width, ranks, 1)
    assert plan.stored
    everyones = pairs * ranks
    # The logits of all, and at most two tiles at work on top of what gathering takes.
    tile = min(plan.tile, everyones)
    allowed = 2 * everyones * width + 4 * pairs * width + pairs * everyones
    allowed += 2 * (pairs + width) * tile + 16 * everyones
    assert pairs * everyones <= 2 * everyones * width
    assert peak_bytes("infonce", pairs, ranks, width, plan, torch.float32) <= allowed * FP32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("exchange, tile", [("auto", "auto"), ("gather", 512), ("ring", "auto")])
@pytest.mark.parametrize("pairs, ranks, width", [(256, 8, 512), (1024, 64, 512), (16384, 8, 1280)])
def test_duplicates_and_smoothing_fit_into_the_bound(pairs, ranks, width, exchange, tile, loss):
    """Their masks are of a tile, and what they know of pairs is [B]."""
    plan = plan_exchange(exchange, tile, pairs, width, ranks, 1)
    peak = peak_bytes(loss, pairs, ranks, width, plan, torch.float32, options=True)
    assert peak <= peak_loss_bytes(plan, pairs, width, ranks, 1)
    without = peak_bytes(loss, pairs, ranks, width, plan, torch.float32)
    tile_of_bools = pairs * min(plan.tile, pairs * ranks)
    assert peak - without <= tile_of_bools + (10 * pairs * ranks + 8 * pairs) * FP32


def test_finding_duplicates_takes_little():
    identities = torch.arange(50_000) // 2
    with PeakBytes(identities) as counted:
        assert find_duplicates(identities, LossGroups()) is not None
    assert counted.peak <= 8 * len(identities) * FP32


def test_the_count_sees_what_is_alive_at_once():
    with fake_rank(Layout(1)):
        known = torch.empty(1000)
        with PeakBytes(known) as counted:
            twice = known * 2  # 4,000
            known += 1
            view = twice[:10]
            del twice
            both = (view + 1, torch.empty(500))  # 40 and 2,000 on top
            del both, view
            torch.empty(1200)
        assert (counted.peak, counted.alive) == (6040, 0)
