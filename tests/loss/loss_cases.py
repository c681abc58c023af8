"""What ranks do in the tests of the losses. No open_clip here."""

from __future__ import annotations

import warnings
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from parallel_clip.engine.groups import Groups
from parallel_clip.loss import ALONE, exchange


class TwoLinears(nn.Module):
    """The smallest CLIP: a linear map for each kind of input, a multiplier and a bias."""

    def __init__(self, image_weight: Tensor, text_weight: Tensor, logit_bias: bool):
        super().__init__()
        self.image_weight = nn.Parameter(image_weight.clone())
        self.text_weight = nn.Parameter(text_weight.clone())
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0)) if logit_bias else None

    def forward(self, images: Tensor, texts: Tensor) -> list[Tensor | None]:
        return [
            F.normalize(images @ self.image_weight, dim=-1),
            F.normalize(texts @ self.text_weight, dim=-1),
            self.logit_scale.exp(),
            self.logit_bias,
        ]


def gradients_under_ddp(
    groups: Groups,
    loss: type[nn.Module],
    model: TwoLinears,
    images: Tensor,
    texts: Tensor,
    ask_for_dictionary: bool,
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients as DDP leaves them; each rank has its chunk of the batch."""
    ranks, rank = groups.layout.data, groups.data_rank
    ddp = DistributedDataParallel(model)
    outputs = ddp(images.chunk(ranks)[rank], texts.chunk(ranks)[rank])
    value = loss()(*outputs, output_dict=ask_for_dictionary)
    if ask_for_dictionary:
        assert list(value) == ["contrastive_loss"]
        value = value["contrastive_loss"]
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


def in_half_precision(groups: Groups, loss: type[nn.Module], features: Tensor) -> tuple:
    """Loss, its dtype and the features' gradient dtype, for bf16 features."""
    mine = features.chunk(groups.layout.data)[groups.data_rank].bfloat16().requires_grad_()
    value = loss(group=groups.data)(mine, mine, torch.tensor(50.0), torch.tensor(-1.0))
    value.backward()
    return value.item(), value.dtype, mine.grad.dtype


def alone_in_a_group(groups: Groups, loss: type[nn.Module], images: Tensor, texts: Tensor) -> float:
    """The loss of this process's pairs: 5 of the 12 on rank 0, 7 on rank 1."""
    own = slice(5) if groups.rank == 0 else slice(5, 12)
    return loss(group=ALONE)(images[own], texts[own], 10.0).item()


class Case(NamedTuple):
    """One call of a loss; `pairs` are of each rank, `features` a key of FEATURES, `identities` of
    IDENTITIES or None, `smoothing` InfoNCE's, `captions` the texts of each picture."""

    loss: type[nn.Module]
    features: str
    pairs: int
    width: int
    scale: float
    dtype: torch.dtype
    exchange: str = "auto"
    tile: int | str = "auto"
    identities: str | None = None
    smoothing: float = 0.0
    captions: int = 1

    def build(self, groups: Groups) -> nn.Module:
        options = {"label_smoothing": self.smoothing} if self.smoothing else {}
        return self.loss(
            group=groups.data,
            helpers=groups.tensor,
            exchange=self.exchange,
            tile=self.tile,
            captions_per_image=self.captions,
            **options,
        )


class Answer(NamedTuple):
    """What one rank has of a case: gradients are its own; `again`: a second call has the same bits,
    or there was none."""

    loss: Tensor
    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor
    again: bool


def whole_batch(case: Case, ranks: int) -> tuple[Tensor, Tensor]:
    """Pictures and texts of all ranks, [ranks · pairs, width] and so many for each caption, rank by
    rank."""
    generator = torch.Generator().manual_seed(case.pairs * case.width)
    count = ranks * case.pairs
    images, *texts = torch.randn(1 + case.captions, count, case.width, generator=generator)
    texts, own = torch.cat(texts), images.repeat_interleave(case.captions, dim=0)
    match case.features:
        case "random":
            pass
        case "duplicated rows":
            images[1::2], texts[1::2] = images[0 : count - 1 : 2], texts[0 : count - 1 : 2]
        case "duplicated across ranks":
            images = images[: case.pairs].repeat(ranks, 1)
            texts = texts[: case.pairs].repeat(ranks, 1)
        case "aligned":
            texts = own
        case "nearly aligned":
            texts = own + 0.3 * texts
    unit = (F.normalize(images, dim=-1), F.normalize(texts, dim=-1))
    return unit[0].to(case.dtype), unit[1].to(case.dtype)


# Of `pairs` texts on each of `ranks` ranks, rank by rank. Some differ in their upper bits alone.
IDENTITIES = {
    "all differ": lambda pairs, ranks: (torch.arange(pairs * ranks) - 3) << 40,
    "some": lambda pairs, ranks: (torch.arange(pairs * ranks) ** 2 % 23) << 40,
    "two on other ranks": lambda pairs, ranks: torch.arange(pairs * ranks) % (pairs * ranks - 1),
    "the same place on every rank": lambda pairs, ranks: torch.arange(pairs).repeat(ranks),
    "a whole rank": lambda pairs, ranks: torch.arange(pairs * ranks).clamp(min=pairs - 1),
    "all equal": lambda pairs, ranks: torch.full((pairs * ranks,), -7),
    "in twos": lambda pairs, ranks: torch.arange(pairs * ranks) // 2,
}


def own_identities(case: Case, groups: Groups) -> Tensor | None:
    if case.identities is None:
        return None
    ranks = groups.layout.data
    texts = case.pairs * case.captions
    return IDENTITIES[case.identities](texts, ranks).chunk(ranks)[groups.data_rank]


FEATURES = ("random", "duplicated rows", "duplicated across ranks", "aligned", "nearly aligned")
BIAS = -3.0


def answers(groups: Groups, cases: list[Case]) -> list[Answer]:
    """Each case on this rank, every third twice; its tensor ranks, with the same pairs, help."""
    return [_answer(groups, case, twice=i % 3 == 0) for i, case in enumerate(cases)]


def _answer(groups: Groups, case: Case, twice: bool) -> Answer:
    rank, ranks = groups.data_rank, groups.layout.data
    own = [x.chunk(ranks)[rank].clone() for x in whole_batch(case, ranks)]
    with warnings.catch_warnings(action="error"):
        loss, identities = case.build(groups), own_identities(case, groups)
        first = _call(loss, own, case.scale, identities)
        again = _call(loss, own, case.scale, identities) if twice else first
    return Answer(*first, again=all(map(torch.equal, first, again)))


def _call(
    loss: nn.Module, features: list[Tensor], scale: float, identities: Tensor | None
) -> list[Tensor]:
    """The loss and the gradients of pictures, texts, scale and bias."""
    arguments = [
        x.clone().requires_grad_() for x in (*features, torch.tensor(scale), torch.tensor(BIAS))
    ]
    value = loss(*arguments, identities=identities)
    value.backward()
    return [value.detach(), *(x.grad for x in arguments)]


class Sent(NamedTuple):
    """A tensor handed to a collective by one rank: its output for a reduce-scatter, else its
    input. `group`: data or helpers."""

    group: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def counts(
    groups: Groups, cases: list[Case], gradients: bool = True
) -> list[tuple[int, list[Sent]]]:
    """Of each case: matrix-product FLOPs of the loss, with its gradients or without, and what it
    hands to collectives."""
    return [_count(groups, case, gradients) for case in cases]


def _count(groups: Groups, case: Case, gradients: bool) -> tuple[int, list[Sent]]:
    rank, ranks = groups.data_rank, groups.layout.data
    own = [x.chunk(ranks)[rank].clone() for x in whole_batch(case, ranks)]
    loss, identities = case.build(groups), own_identities(case, groups)
    names = {groups.data: "data", groups.tensor: "helpers"}
    sent = []

    def recording(module: object, operation: str):
        plain = getattr(module, operation)

        def record(first: Tensor, second: Tensor | None = None, *rest, group, **options):
            tensor = second if operation == "all_gather_single" else first
            sent.append(Sent(names[group], operation, tuple(tensor.shape), tensor.dtype))
            arguments = [x for x in (first, second) if x is not None]
            return plain(*arguments, *rest, group=group, **options)

        return mock.patch.object(module, operation, record)

    flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with (
        recording(exchange, "all_gather_single"),
        recording(exchange, "reduce_scatter_single"),
        recording(dist, "all_reduce"),
        torch.set_grad_enabled(gradients),
        flops,
    ):
        arguments = [*own, torch.tensor(case.scale), torch.tensor(BIAS)]
        value = loss(*(x.requires_grad_() for x in arguments), identities=identities)
        if gradients:
            value.backward()
    return flops.get_total_flops(), sent


def _addmm_flops(into: torch.Size, left: torch.Size, right: torch.Size, **_) -> int:
    """The counter knows addmm and not addmm_, which adds to what is there."""
    return 2 * left[0] * left[1] * right[1]
