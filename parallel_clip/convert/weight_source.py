"""Weights of a model in a checkpoint of any format, as tensors by name with what is stored beside.

There is one file a format: native.py, openclip.py, huggingface.py. `ModelWeights`
(model_weights.py) checks that they are those of an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from parallel_clip.convert.training_facts import TrainingFacts
from parallel_clip.model.architecture import Architecture


@dataclass(frozen=True)
class SourceMetadata:
    """The model, preprocessing and tokenizer that a source names; None where it names none.

    path: the file or checkpoint folder; folder: where tokenizer files may lie; architecture;
    preprocess: OpenCLIP's preprocess_cfg; tokenizer: as `data.tokenizer`; said_by: what says all
    this, for messages; preprocess_from: what says the preprocessing, where that is another file;
    step: optimizer steps done; has_averages: whether averages of weights are beside them; training:
    what is known of it; notes: what a user should be told.
    """

    path: Path
    folder: Path
    architecture: Architecture | None = None
    preprocess: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    said_by: Path | None = None
    preprocess_from: Path | None = None
    step: int | None = None
    has_averages: bool = False
    training: TrainingFacts | None = None
    notes: tuple[str, ...] = ()


class WeightSource(Protocol):
    """An opened checkpoint: tensors by the names that it has, and the metadata stored with them.

    content: all that a file of torch.save holds, None for others.
    """

    metadata: SourceMetadata
    content: Mapping[str, Any] | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of each tensor by its name."""

    def read(self, name: str) -> Tensor:
        """A full tensor, on the CPU, in the precision in which it is stored."""
