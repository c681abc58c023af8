"""What the losses cost on real ranks: matrix products, and what they hand to collectives.

N data ranks hold b pairs of width D each, B = N·b; H ranks hold the same pairs and help. The FLOPs
of one product of a rank's pictures with all texts are U = 2·b·B·D, a helper's an H-th of it. The
numbers that leave a rank when all texts are gathered, or the gradients of all texts are reduced and
scattered, are v = (N-1)/N·B·D.

Over the data group go v numbers for gathering and v for gradients, a helper's H-th of each; InfoNCE
streams its texts twice and needs 3 v. Texts travel in their own dtype, gradients in fp32. What else
goes over the data group is InfoNCE's maximum and sum of each column, and a few single numbers.

Over the helpers' group go the gradients [2·b, D] in one all-reduce, InfoNCE's maximum and sum of
each row, [b] each, and two or three fp64 numbers. No features do: helpers hold them already.
"""

from math import prod

import pytest
import torch

from parallel_clip.layout import Layout
from parallel_clip.loss import ClipLoss, SigLipLoss
from tests.loss.loss_cases import Case, Sent, counts

LAYOUTS = [Layout(1), Layout(2), Layout(3), Layout(2, tensor=2), Layout(4, tensor=2)]
PAIRS, WIDTH = 12, 32
# Ways to compute, the products that each takes and how often texts or their gradients travel.
COSTS = [
    (ClipLoss, "auto", "auto", 3, 2),
    (ClipLoss, "gather", 8, 4, 2),
    (ClipLoss, "ring", "auto", 4, 3),
    (ClipLoss, "ring", 8, 4, 3),
    (SigLipLoss, "auto", "auto", 3, 2),
    (SigLipLoss, "gather", 8, 3, 2),
    (SigLipLoss, "ring", 8, 3, 2),
]


def case_for(loss: type, exchange: str = "auto", tile="auto", dtype=torch.float32) -> Case:
    return Case(loss, "random", PAIRS, WIDTH, 20.0, dtype, exchange, tile)


def one_product(layout: Layout) -> int:
    return 2 * PAIRS * PAIRS * layout.data * WIDTH // layout.tensor


def leaving(sent: Sent, ranks: int) -> float:
    """The numbers that leave a rank: to each other one, or there and back for an all-reduce."""
    if sent.operation == "all_reduce":
        return 2 * (ranks - 1) / ranks * prod(sent.shape)
    return (ranks - 1) * prod(sent.shape)


def is_of_features(sent: Sent) -> bool:
    return sent.shape[-1:] == (WIDTH,)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.data}x{x.tensor}")
def test_products_and_traffic(processes, layout):
    cases = [case_for(*way) for *way, _, _ in COSTS]
    for answers in processes.run(layout, counts, cases=cases):
        for (*way, products, exchanges), (flops, sent) in zip(COSTS, answers, strict=True):
            assert flops == products * one_product(layout), way
            check_data_group([x for x in sent if x.group == "data"], layout, exchanges)
            helpers = [(x.operation, x.shape, x.dtype) for x in sent if x.group == "helpers"]
            of_rows = [("all_reduce", (PAIRS,), torch.float32)] * 2
            singles = 2 if way[0] is ClipLoss else 3
            expected = [
                ("all_reduce", (singles,), torch.float64),
                ("all_reduce", (2 * PAIRS, WIDTH), torch.float32),
            ]
            if way[0] is ClipLoss:
                expected = of_rows + expected
            assert helpers == (expected if layout.tensor > 1 else []), way


def check_data_group(sent: list[Sent], layout: Layout, exchanges: int) -> None:
    texts_of_all = (layout.data - 1) * PAIRS * WIDTH  # v
    features = sum(leaving(x, layout.data) for x in sent if is_of_features(x))
    assert features * layout.tensor == exchanges * texts_of_all
    others = [x for x in sent if not is_of_features(x)]
    in_fp32 = sum(leaving(x, layout.data) * x.dtype.itemsize / 4 for x in others)
    assert in_fp32 <= 6 * PAIRS * layout.data


def test_half_precision_texts_travel_as_they_are(processes):
    cases = [
        case_for(loss, exchange, dtype=torch.bfloat16)
        for loss in (ClipLoss, SigLipLoss)
        for exchange in ("gather", "ring")
    ]
    for answers in processes.run(Layout(2), counts, cases=cases):
        for _, sent in answers:
            assert {(x.operation, x.dtype) for x in sent if is_of_features(x)} == {
                ("all_gather_single", torch.bfloat16),
                ("reduce_scatter_single", torch.float32),
            }


def test_without_gradients_there_is_one_product_and_one_exchange(processes):
    """Even though the arguments ask for gradients, as parameters do."""
    layout = Layout(4, tensor=2)
    cases = [case_for(*way) for *way, _, _ in COSTS]
    for answers in processes.run(layout, counts, cases=cases, gradients=False):
        for flops, sent in answers:
            assert flops == one_product(layout)
            features = sum(leaving(x, layout.data) for x in sent if is_of_features(x))
            assert features * layout.tensor == (layout.data - 1) * PAIRS * WIDTH
