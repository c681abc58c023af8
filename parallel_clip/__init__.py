"""Model-parallel training of CLIP-like dual encoders.

What is public for Python users is in `__all__`: the losses, which stand in anyone's training
script; `load_encoder`, a checkpoint's towers; `evaluation_transform`, its preprocessing as a
function of pictures; `convert_checkpoint`; and `InputError`, which all of these raise where the
input is wrong. All of it works any number of times in a process, beside other models. See
docs/python.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_clip.convert.choose_model import ModelChoice
    from parallel_clip.convert.open import convert_checkpoint
    from parallel_clip.data.samples.transforms import evaluation_transform
    from parallel_clip.errors import InputError
    from parallel_clip.evaluate.encoder import load_encoder
    from parallel_clip.loss.infonce import ClipLoss
    from parallel_clip.loss.sigmoid import SigLipLoss

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "InputError",
    "ModelChoice",
    "SigLipLoss",
    "convert_checkpoint",
    "evaluation_transform",
    "load_encoder",
]

_FILES = {
    "ClipLoss": "loss.infonce",
    "InputError": "errors",
    "ModelChoice": "convert.choose_model",
    "SigLipLoss": "loss.sigmoid",
    "convert_checkpoint": "convert.open",
    "evaluation_transform": "data.samples.transforms",
    "load_encoder": "evaluate.encoder",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: a command that needs no torch starts at once."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
