"""The fused attention kernels against the plain formula, at the sizes that CLIP models have."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.small_models import distance

pytestmark = pytest.mark.gpu

PAIRS, HEADS = 2, 3

# Of a result's or gradient's distance to the plain formula in fp64, as vectors. fp32 rounds to
# 6e-8, which sums over 257 tokens and 128 channels make larger; TF32, which must not be used, to
# 5e-4.
FP32_TOLERANCE = 1e-5
# bf16 rounds to 4e-3. A fused kernel rounds fewer times than the plain formula in bf16 does; half
# as much again is for a kernel that rounds elsewhere.
BF16_TOLERANCE, BF16_FACTOR = 1e-2, 1.5


class Attended(NamedTuple):
    """What attention gives, [b, n, s, d], and the gradient of qkv, [s, b, 3, n, d]."""

    value: Tensor
    gradient: Tensor


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v


def attend(core, qkv: Tensor, grad: Tensor, causal: bool) -> Attended:
    """With q, k and v as strided views of one projection, as model/layers.py takes them."""
    leaf = qkv.detach().requires_grad_()
    value = core(*leaf.permute(2, 1, 3, 0, 4).unbind(0), causal)
    value.backward(grad.to(value.dtype))
    return Attended(value.detach(), leaf.grad)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", [50, 77, 197, 257])
@pytest.mark.parametrize("width", [16, 64, 80, 88, 104, 112, 128])
def test_fused_attention_is_the_plain_formula(groups, width, tokens, causal):
    generator = torch.Generator().manual_seed(width * tokens)
    qkv = torch.randn(tokens, PAIRS, 3, HEADS, width, generator=generator).to(groups.device)
    grad = torch.randn(PAIRS, HEADS, tokens, width, generator=generator).to(groups.device)
    exact = attend(plain, qkv.double(), grad.double(), causal)
    in_fp32 = attend(fused, qkv, grad, causal)
    for found, wanted in zip(in_fp32, exact, strict=True):
        assert distance(found, wanted) < FP32_TOLERANCE

    rounded, rounded_grad = qkv.bfloat16(), grad.bfloat16()
    exact = attend(plain, rounded.double(), rounded_grad.double(), causal)
    in_bf16 = attend(fused, rounded, rounded_grad, causal)
    plain_bf16 = attend(plain, rounded, rounded_grad, causal)
    for found, theirs, wanted in zip(in_bf16, plain_bf16, exact, strict=True):
        assert distance(found, wanted) < BF16_TOLERANCE
        assert distance(found, wanted) < BF16_FACTOR * distance(theirs, wanted)
