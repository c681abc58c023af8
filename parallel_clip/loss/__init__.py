"""Contrastive losses over embeddings that are spread over the data-parallel ranks.

Names are imported when first used, so that `exchange_plan` can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_clip.loss.contrastive import ALONE
    from parallel_clip.loss.infonce import ClipLoss
    from parallel_clip.loss.sigmoid import SigLipLoss

__all__ = ["ALONE", "ClipLoss", "SigLipLoss"]


def __getattr__(name: str) -> Any:
    files = {"ALONE": "contrastive", "ClipLoss": "infonce", "SigLipLoss": "sigmoid"}
    if name not in files:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{files[name]}"), name)
