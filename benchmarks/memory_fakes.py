"""OpenCLIP's model in fake tensors, and what its forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel_clip.plan.saved_activations import SavedActivations

Build = Callable[[], nn.Module]  # makes an OpenCLIP model on the meta device


@contextmanager
def fake_model(build: Build, device: str, checkpointing: bool = False) -> Iterator[nn.Module]:
    """The model in fake tensors. Inside, every new tensor is fake."""
    model = build()  # outside: timm reads values while it builds a model
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=device).train()
        model.set_grad_checkpointing(checkpointing)
        yield model


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """bf16 autocast for fake tensors of a GPU, in a process that has none: `torch.autocast` would
    switch itself off, and attention would look for a GPU to choose its kernel by."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", _attention_of_a_gpu):
            yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def _attention_of_a_gpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0,
    is_causal=False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """FlashAttention, or where there is a mask, which it does not take, the memory-efficient one.
    What they keep is the same but for the mask."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]


def saved_bytes(model: nn.Module, pairs: int, device: str) -> int:
    """What the forward pass of `pairs` keeps, beside parameters and inputs; on "cuda" under
    autocast."""
    images, texts = inputs_of(model, pairs, device)
    autocast = as_on_a_gpu() if device == "cuda" else nullcontext()
    with autocast, SavedActivations(model, excluded=[images, texts]) as saved:
        features = model(images, texts)
    del features
    return saved.total


def inputs_of(model: nn.Module, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    """Pictures in fp32, as OpenCLIP feeds them, and texts; all zeros."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images = torch.zeros(pairs, 3, height, width, device=device)
    texts = torch.zeros(pairs, context_length(model), dtype=torch.int64, device=device)
    return images, texts


def context_length(model: nn.Module) -> int:
    return getattr(model, "text", model).context_length
