"""Base class of both contrastive losses: arguments, checks, autograd function."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from parallel_clip.loss.duplicates import Duplicates, find_duplicates
from parallel_clip.loss.exchange import LossGroups, gather
from parallel_clip.loss.exchange_plan import Exchange, ExchangePlan, plan_exchange

# For `group`: the batch is this process's pairs, whatever process groups there are.
ALONE: Literal["alone"] = "alone"

# A warning is given where a feature's norm is further from 1; bf16 rounding is well within.
_NORM_TOLERANCE = 0.02

# OpenCLIP's `dist_impl`, its way to exchange texts in the sigmoid loss, as an `exchange`.
_EXCHANGES = {"gather": "gather", "reduce": "gather", "bidir": "ring", "shift": "ring"}


class Gradients(NamedTuple):
    """d loss / d features, fp32 [b, D] and [b·k, D], times the number of data-parallel ranks;
    d loss / d multiplier and d loss / d bias, fp64 0-dim, the same on every rank."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LossCall:
    """How one call is computed: on which groups, exchanged and tiled how, with gradients or not,
    and which pairs are not each other's negatives (None: all are)."""

    groups: LossGroups
    plan: ExchangePlan
    want_gradients: bool
    duplicates: Duplicates | None = None


class ContrastiveLoss(nn.Module):
    """A loss of the whole global batch, from each data-parallel rank's own pairs.

    group: the data-parallel ranks; None: all processes of the default process group, or this
        process where there is none; ALONE: this process. Every rank must hold the same number of
        pairs.
    helpers: ranks that hold the same pairs as this one, such as its tensor-parallel group; they
        split the work.
    exchange: "gather" holds all texts at once, "ring" streams them and their gradients in chunks;
        "auto" decides by size. tile: columns of logits worked on at a time; "auto" decides by size,
        and keeps the logits where they are small (InfoNCE).
    captions_per_image: k, the texts of each picture, all of them positives: row i·k + j of the text
        features is text j of picture i. "Pairs" are pictures with their texts then.

    The other arguments are those of OpenCLIP's losses. `local_loss`, `gather_with_grad` and
    `cache_labels` change nothing: loss and gradients are exact whatever they say. `rank` and
    `world_size` must be those of the group.

    Raises:
        ValueError: `use_horovod`; an unknown `exchange` or `dist_impl`; a `tile` or
            `captions_per_image` below 1.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        dist_impl: str | None = None,
        *,
        group: ProcessGroup | Literal["alone"] | None = None,
        helpers: ProcessGroup | None = None,
        exchange: Exchange = "auto",
        tile: int | Literal["auto"] = "auto",
        captions_per_image: int = 1,
    ):
        super().__init__()
        if not isinstance(local_loss, bool):
            raise ValueError("local_loss is a bool; a process group is given as group=...")
        if use_horovod:
            raise ValueError("use_horovod: only torch.distributed is supported; leave it out")
        if dist_impl is not None:
            if exchange != "auto":
                raise ValueError(f"both dist_impl {dist_impl} and exchange {exchange}: give one")
            if dist_impl not in _EXCHANGES:
                known = ", ".join(_EXCHANGES)
                raise ValueError(f"dist_impl {dist_impl!r}: expected one of {known}")
            exchange = _EXCHANGES[dist_impl]
        if exchange not in ("auto", "gather", "ring"):
            raise ValueError(f"exchange {exchange!r}: expected auto, gather or ring")
        if tile != "auto" and tile < 1:
            raise ValueError(f"tile {tile}: expected auto or a number of columns of at least 1")
        if captions_per_image < 1:
            raise ValueError(f"captions_per_image {captions_per_image}: expected 1 or more")
        self.group, self.helpers = group, helpers
        self.captions = captions_per_image
        self.exchange, self.tile = exchange, tile
        self._expected_place = rank, world_size
        self._groups: LossGroups | None = None
        self._checked: tuple[torch.Size, bool] | None = None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        identities: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, fp32 and the same on every rank; DDP's mean over ranks of the gradients is the
        full-batch gradient, that of `logit_scale` and `logit_bias` included.

        image_features, text_features: [b, D] and [b·k, D], fp32 or bf16, of length 1; with one
        caption a picture, row i of each is a pair.
        logit_scale: the multiplier itself; logit_bias: added to every logit. Logits and log-sum-exp
        are fp32 whatever the features are; gradients are summed in fp32 and rounded once.
        identities: int64 [b·k], of the texts, on every rank or on none, the same on helpers. Where
        two pictures of the global batch have texts with equal ones these are not negatives: the
        logits of one's picture with such a text of the other take no part, neither in a softmax
        nor as a term of the sigmoid loss. Where all pictures' differ, loss and gradients have the
        bits that they have without; the host waits once for the device, to know it.

        Ranks compare their shapes at the first call, and where this rank's has changed since, or
        identities come or are gone: all ranks change theirs at the same call.

        Raises:
            ValueError: shapes that do not match; no pairs; ranks with other numbers of pairs or
                another width, or some with identities; a group that does not hold this rank.
        """
        if image_features.ndim != 2 or text_features.shape != (
            len(image_features) * self.captions,
            image_features.shape[1],
        ):
            expected = "[pairs, width] twice, row i of each a pair"
            if self.captions > 1:
                expected = f"[pictures, width] and [{self.captions} · pictures, width]"
            raise ValueError(
                f"image_features {list(image_features.shape)} and text_features "
                f"{list(text_features.shape)}: expected {expected}"
            )
        if identities is not None and (
            identities.shape != text_features.shape[:1] or identities.dtype != torch.int64
        ):
            raise ValueError(
                f"identities {list(identities.shape)} of {identities.dtype}: expected one of "
                f"torch.int64 for each of the {len(text_features)} texts"
            )
        first_call = self._groups is None
        if first_call:
            self._groups = self._find_groups()
        seen = image_features.shape, identities is not None
        if seen != self._checked:  # on all ranks at once: the host waits
            _check_equal_shapes(image_features, identities, self._groups)
            self._checked = seen
        if first_call:
            _warn_if_not_normalised(image_features, text_features)
        device = image_features.device
        scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=device).reshape(())
        bias = None
        if logit_bias is not None:
            bias = torch.as_tensor(logit_bias, dtype=torch.float32, device=device).reshape(())
        duplicates = None
        if identities is not None:
            duplicates = find_duplicates(identities.to(device), self._groups, self.captions)
        want_gradients = torch.is_grad_enabled()  # always off inside of a Function
        loss = _InAutograd.apply(
            image_features, text_features, scale, bias, self, want_gradients, duplicates
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def plan(self, pairs: int, width: int) -> ExchangePlan:
        """How a batch of `pairs` on each rank is computed."""
        groups = self._groups or self._find_groups()
        sizes = pairs, width, groups.data_size, groups.helper_size, self.captions
        return plan_exchange(self.exchange, self.tile, *sizes)

    def _compute(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, call: LossCall
    ) -> tuple[Tensor, Gradients | None]:
        """The loss, fp64 0-dim, and its gradients where they are wanted.

        images, texts: [b, D] and [b·k, D] as given; scale, bias: fp32 0-dim.
        """
        raise NotImplementedError

    def _find_groups(self) -> LossGroups:
        group = self.group
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        elif group == ALONE:
            group = None
        for name, given in (("group", group), ("helpers", self.helpers)):
            if given is not None and dist.get_rank(given) < 0:
                raise ValueError(f"{name}: rank {dist.get_rank()} is not one of its ranks")
        groups = LossGroups(group, self.helpers)
        rank, world_size = self._expected_place
        places = ("rank", rank, groups.data_rank), ("world_size", world_size, groups.data_size)
        for name, given, found in places:
            if given is not None and given != found:
                raise ValueError(f"{name} {given}, but the process group says {found}")
        return groups


class _InAutograd(torch.autograd.Function):
    """The gradients are computed with the loss, while its logits are at hand."""

    @staticmethod
    def forward(
        ctx,
        images,
        texts,
        scale,
        bias,
        loss: ContrastiveLoss,
        want_gradients: bool,
        duplicates: Duplicates | None,
    ) -> Tensor:
        want_gradients = want_gradients and any(ctx.needs_input_grad)
        call = LossCall(loss._groups, loss.plan(*images.shape), want_gradients, duplicates)
        with torch.autocast(images.device.type, enabled=False):
            value, gradients = loss._compute(images, texts, scale, bias, call)
        if gradients is not None:
            of_inputs = zip(gradients, (images, texts, scale, bias), strict=True)
            ctx.save_for_backward(*(grad.to(x.dtype) for grad, x in of_inputs if x is not None))
        return value.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Any, ...]:
        grads = [grad * saved for saved in ctx.saved_tensors]
        return (*grads, *[None] * (7 - len(grads)))


def _check_equal_shapes(features: Tensor, identities: Tensor | None, groups: LossGroups) -> None:
    """Raises ValueError where ranks hold other shapes: their collectives would not match."""
    own = *features.shape, int(identities is not None)
    everyones = [own]
    if groups.data_size > 1:
        found = gather(torch.tensor([own], device=features.device), groups.data)
        everyones = [tuple(row) for row in found.tolist()]
    if len(set(everyones)) > 1:
        with_identities = len({row[2] for row in everyones}) > 1
        globally = dist.get_process_group_ranks(groups.data)
        shown = ", ".join(
            f"rank {rank}: {pairs} x {width}"
            + (f" {'with' if has else 'without'} identities" if with_identities else "")
            for rank, (pairs, width, has) in zip(globally, everyones, strict=True)
        )
        also = ", all with identities or all without" if with_identities else ""
        raise ValueError(
            f"every rank must hold the same number of pairs, of the same width{also}; {shown}"
        )
    if len(features) == 0:  # not before all ranks have met: others may have some, and would wait
        raise ValueError("there are no pairs: image_features is empty")


def _warn_if_not_normalised(images: Tensor, texts: Tensor) -> None:
    for name, features in (("image_features", images), ("text_features", texts)):
        off = (features.detach().float().norm(dim=-1) - 1).abs().max().item()
        if off > _NORM_TOLERANCE:
            warnings.warn(
                f"{name} are not of length 1 (one is off by {off:.2g}): the loss takes them as "
                "they are; F.normalize(features, dim=-1) is what CLIP's losses expect",
                stacklevel=5,
            )
