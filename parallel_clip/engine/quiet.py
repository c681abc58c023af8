"""Silence warnings that dependencies give on import about features that are not used here."""

from __future__ import annotations

import logging
import warnings


def silence_dependency_warnings() -> None:
    """To be called before torch and megatron-core are imported."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"megatron\.", r"torch\.distributed\.", r"torch\.cuda", r"torch\.jit"):
        warnings.filterwarnings("ignore", module=module)
    # data.workers and evaluate.workers are the user's choice.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # That a pickled checkpoint is refused is said by us.
    warnings.filterwarnings("ignore", message="Detected pickle protocol")
    # megatron-core's optimizers look at the gradient of a view of a parameter.
    warnings.filterwarnings(
        "ignore", message=r"The \.grad attribute of a Tensor that is not a leaf"
    )
