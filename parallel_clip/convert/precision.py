"""In which precision weights are written, and rounding to it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_clip.convert.model_weights import count_not_finite
from parallel_clip.convert.tensor_fit import LOGIT_PARAMETERS
from parallel_clip.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def written_dtype(name: str, precision: str) -> torch.dtype:
    """Of the parameter `name` (global name): bf16 would put the multiplier of the logits off by up
    to 1%, so the logit parameters stay in fp32."""
    return torch.float32 if name in LOGIT_PARAMETERS else PRECISIONS[precision]


def rounded(tensor: Tensor, name: str, precision: str) -> Tensor:
    """The tensor as it is written: itself where it has that precision already.

    Raises:
        InputError: a value becomes infinite.
    """
    dtype = written_dtype(name, precision)
    result = tensor.to(dtype)
    if dtype != torch.float32 and count_not_finite(result):
        largest = float(tensor.abs().max())
        raise InputError(
            f"{name} has values up to {largest:.4g}, which become infinite as {dtype} (the "
            f"largest there is {torch.finfo(dtype).max:.4g}); choose another --precision"
        )
    return result
