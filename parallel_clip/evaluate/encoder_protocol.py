"""What an evaluation asks of a model, whatever it was made of or is spread over."""

from typing import Protocol

import torch
from torch import Tensor

from parallel_clip.data.tokenizer import Tokenizer
from parallel_clip.data.transforms import Preprocess
from parallel_clip.model.architectures import Architecture


class Encoder(Protocol):
    """Both towers, with what goes before them.

    Where ranks share a model they call together, with the same arguments. Where it lies on the
    stages of a pipeline, what `encode_*` returns is right on the last stage alone, so that a stage
    can begin the next batch; `from_last_stage` hands it to all once everything is encoded.
    """

    architecture: Architecture
    preprocess: Preprocess
    tokenizer: Tokenizer
    device: torch.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures fp32 [n, 3, H, W] to features fp32 [n, D] of length 1; both on `device`."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [n, L] to features fp32 [n, D] of length 1; both on `device`."""
        ...

    def from_last_stage(self, values: Tensor) -> Tensor:
        """The last stage's values, of the same shape on each, on every rank that shares a model."""
        ...
