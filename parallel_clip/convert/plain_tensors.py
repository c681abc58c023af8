"""Which tensors of a file can be taken for weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel_clip.errors import InputError

# A number an element. The others are whole numbers, packed (float4_e2m1fn_x2), or scales of
# others' (float8_e8m0fnu).
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of one shape; a nested one has none."""
    return isinstance(value, Tensor) and not value.is_nested


def check_plain(tensor: Tensor, name: str) -> None:
    """`name`: of the tensor and its file, for the message.

    Raises:
        InputError: it is sparse or of another layout, without values, or
            not of floating-point numbers.
    """
    if tensor.layout != torch.strided:
        raise InputError(
            f"{name} is stored as {tensor.layout}; save it with all its values (to_dense())"
        )
    if tensor.device.type != "cpu":
        raise InputError(
            f"{name} is on the device {tensor.device.type!r}, without values in the file; save "
            "the model once its weights are loaded"
        )
    if tensor.dtype not in _DTYPES:
        raise InputError(
            f"{name} is of {tensor.dtype}; weights have to be floating-point numbers, not "
            "quantized ones"
        )
