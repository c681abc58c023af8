"""What transformers' zero-shot pipeline has to be told of a converted model's texts."""

from __future__ import annotations

import json
from typing import Any

from parallel_clip.convert.huggingface_config_writer import is_siglip
from parallel_clip.model.architecture import Architecture

# To so many tokens it pads the texts of SigLIP, whatever config and tokenizer say.
PIPELINE_TOKENS = 64


def text_length_line(architecture: Architecture) -> str | None:
    """The line that makes it pad to the model's own length; None where it does so by itself."""
    length = architecture.text.context_length
    if not is_siglip(architecture) or length == PIPELINE_TOKENS:
        return None
    return pipeline_line(max_length=length)


def pipeline_line(**options: Any) -> str:
    """A line of Python after which the pipeline `classify` hands `options` to its tokenizer.

    By its stored parameters: the pipeline of transformers 5 (5.24) drops an argument
    `tokenizer_kwargs`, that of 4 takes both.
    """
    return f'classify._preprocess_params["tokenizer_kwargs"] = {json.dumps(options)}'
