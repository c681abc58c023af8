"""How the text of a caption is cleaned before it is split into tokens; equal to OpenCLIP's."""

import html
import string
from collections.abc import Callable

import ftfy

from parallel_clip.errors import InputError

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def text_cleaner(kind: str) -> Callable[[str], str]:
    """The cleaning that OpenCLIP's `tokenizer_kwargs.clean` names: lower, whitespace or
    canonicalize. All repair broken encodings, resolve HTML entities and put one space for white
    space; what they give has no lone surrogate.

    Raises:
        InputError: there is no cleaning of that name.
    """
    if not isinstance(kind, str) or kind not in _CLEANERS:
        raise InputError(
            f"text_cfg.tokenizer_kwargs.clean of the model is {kind!r}: "
            f"expected one of {', '.join(_CLEANERS)}"
        )
    return _CLEANERS[kind]


def _repair(text: str) -> str:
    """Broken encodings mended, HTML entities (written twice over, too) resolved."""
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _whitespace(text: str) -> str:
    return " ".join(_repair(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    return " ".join(_repair(text).translate(_NO_PUNCTUATION).lower().split())


_CLEANERS = {"lower": _lower, "whitespace": _whitespace, "canonicalize": _canonicalize}
