"""The tokenizer of a Hugging Face folder: which of ours it is, and the files to write."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parallel_clip.data.samples.saved_tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    has_tokenizer,
)
from parallel_clip.data.samples.tokenizer import clip_vocabulary
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.towers.text import TextConfig

Json = dict[str, Any]

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# A key of ours in the settings: what OpenCLIP's text_cfg says of the tokenizer.
_OPENCLIP_KEY = "open_clip"
# How a class of transformers cleans texts, in the words of OpenCLIP.
_CLEANING = {"SiglipTokenizer": "canonicalize", "Siglip2Tokenizer": "lower"}


class FoundTokenizer(NamedTuple):
    """choice: as `data.tokenizer`; text_cfg: OpenCLIP's keys that name it; note: what to tell."""

    choice: str
    text_cfg: Json
    note: str | None = None


def find_tokenizer(folder: Path, *, siglip: bool) -> FoundTokenizer:
    """The tokenizer in the folder of a CLIPModel or SiglipModel.

    Raises:
        InputError: one of its files is damaged.
    """
    vocabulary = _read_vocabulary(folder)
    if vocabulary is None and not has_tokenizer(folder) and not siglip:
        note = f"{folder} holds no tokenizer; CLIP's own is taken, as transformers would"
        return FoundTokenizer("openclip", {}, note)
    if vocabulary is not None and _is_clips_own(vocabulary):
        return FoundTokenizer("openclip", {})
    settings = (
        _read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    )
    own = settings.get(_OPENCLIP_KEY)
    if isinstance(own, Mapping) and own.keys() <= {"hf_tokenizer_name", "tokenizer_kwargs"}:
        return FoundTokenizer(str(folder), dict(own))
    text_cfg: Json = {"hf_tokenizer_name": folder.resolve().name}
    clean = _CLEANING.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
    if clean is not None:
        text_cfg["tokenizer_kwargs"] = {"clean": clean}
    return FoundTokenizer(str(folder), text_cfg)


def _is_clips_own(vocabulary: Mapping[str, int]) -> bool:
    tokens, _ = clip_vocabulary()
    return all(vocabulary.get(token) == number for number, token in enumerate(tokens))


def _read_vocabulary(folder: Path) -> Mapping[str, int] | None:
    if (folder / TOKENIZER_JSON).is_file():
        model = _read_json(folder / TOKENIZER_JSON).get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        return vocabulary if isinstance(vocabulary, Mapping) else None
    return _read_json(folder / _VOCABULARY) if (folder / _VOCABULARY).is_file() else None


def _read_json(file: Path) -> Json:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return values
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def tokenizer_files_to_write(
    tokenizer: TokenizerFiles, text: TextConfig, *, siglip: bool
) -> dict[str, bytes]:
    """The files by which AutoTokenizer gives a model's tokens, cut to its context length; none
    where the tokenizer's own files are not at hand.

    Raises:
        InputError: the tokenizer's settings are damaged.
    """
    if tokenizer.name is None:
        return _clip_files(text)
    files = tokenizer.for_transformers()
    if not files:
        return {}
    settings = json.loads(files[TOKENIZER_CONFIG]) | {"model_max_length": text.context_length}
    if siglip:  # whose text tower works on the padding as well
        settings |= {"model_input_names": ["input_ids"]}
    kwargs = dict(text.tokenizer_kwargs)
    settings[_OPENCLIP_KEY] = {"hf_tokenizer_name": tokenizer.name}
    if kwargs:
        settings[_OPENCLIP_KEY]["tokenizer_kwargs"] = kwargs
    cleaning = _CLEANING.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
    if kwargs.get("clean") in _NORMALIZERS and cleaning is None and TOKENIZER_JSON in files:
        files[TOKENIZER_JSON] = with_cleaning(files[TOKENIZER_JSON], kwargs["clean"])
        # Other classes make a normalizer of their own.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return files | {TOKENIZER_CONFIG: _json(settings)}


def _clip_files(text: TextConfig) -> dict[str, bytes]:
    tokens, merges = clip_vocabulary()
    if text.vocab_size < len(tokens) + 2:
        return {}
    vocabulary = {token: number for number, token in enumerate([*tokens, _START, _END])}
    ends = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    return {
        _VOCABULARY: _json(vocabulary, indent=None),
        _MERGES: "".join(f"{line}\n" for line in lines).encode(),
        SPECIAL_TOKENS: _json(ends),
        TOKENIZER_CONFIG: _json(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, **ends}
        ),
    }


def _replaced(pattern: str, content: str) -> Json:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_LOWER = [
    {"type": "Lowercase"},
    _replaced(r"\s+", " "),
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
_PUNCTUATION = "".join(f"\\{mark}" for mark in string.punctuation if mark != "_")
# OpenCLIP's cleaning of texts in the `tokenizers` library's own steps, without the repair of broken
# encodings and of HTML.
_NORMALIZERS: dict[str, list[Json]] = {
    "lower": _LOWER,
    "canonicalize": [_replaced("_", " "), _replaced(f"[{_PUNCTUATION}]", ""), *_LOWER],
}


def with_cleaning(tokenizer_json: bytes, clean: str) -> bytes:
    """A tokenizer.json that cleans texts before anything else: "lower" or "canonicalize". Itself
    where it does so already."""
    content = json.loads(tokenizer_json)
    first, rest = _NORMALIZERS[clean], content.get("normalizer")
    steps = rest.get("normalizers", [rest]) if rest else []
    if steps[: len(first)] == first:
        return tokenizer_json
    content["normalizer"] = {"type": "Sequence", "normalizers": [*first, *steps]}
    return _json(content, indent=None)


def _json(content: Json, indent: int | None = 2) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
