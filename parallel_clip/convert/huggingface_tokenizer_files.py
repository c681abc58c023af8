"""The tokenizer of a Hugging Face folder: which of ours it is, and the files to write."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from parallel_clip.data.samples.huggingface_tokenizer import as_tokenizer_json
from parallel_clip.data.samples.saved_tokenizer import (
    SIGLIP,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    SavedTokenizer,
    find_tokenizer,
    has_tokenizer,
)
from parallel_clip.data.samples.sentencepiece_tokenizer import SENTENCEPIECE_TOKENIZERS
from parallel_clip.data.samples.tokenizer import clip_vocabulary
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.towers.text import TextConfig

Json = dict[str, Any]

_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
# A key of ours in the settings: what OpenCLIP's text_cfg says of the tokenizer.
_OPENCLIP_KEY = "open_clip"


class FolderTokenizerChoice(NamedTuple):
    """choice: as `data.tokenizer`; text_cfg: OpenCLIP's keys that name it; note: what to tell."""

    choice: str
    text_cfg: Json
    note: str | None = None


def tokenizer_of_folder(folder: Path, *, siglip: bool) -> FolderTokenizerChoice:
    """The tokenizer in the folder of a CLIPModel or SiglipModel.

    Raises:
        InputError: one of its files is damaged.
    """
    vocabulary = _read_vocabulary(folder)
    if vocabulary is None and not has_tokenizer(folder) and not siglip:
        note = f"{folder} holds no tokenizer; CLIP's own is taken, as transformers would"
        return FolderTokenizerChoice("openclip", {}, note)
    if vocabulary is not None and _is_clips_own(vocabulary):
        return FolderTokenizerChoice("openclip", {})
    settings = folder / TOKENIZER_CONFIG
    own = _read_json(settings).get(_OPENCLIP_KEY) if settings.is_file() else None
    if isinstance(own, Mapping) and own.keys() <= {"hf_tokenizer_name", "tokenizer_kwargs"}:
        return FolderTokenizerChoice(str(folder), dict(own))
    return FolderTokenizerChoice(str(folder), {"hf_tokenizer_name": folder.resolve().name})


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


class WrittenTokenizer(NamedTuple):
    """files by their names, none where the tokenizer's own are not at hand; note: what to tell."""

    files: dict[str, bytes]
    note: str | None = None


def huggingface_tokenizer(
    tokenizer: TokenizerFiles, text: TextConfig, *, siglip: bool
) -> WrittenTokenizer:
    """What AutoTokenizer needs to give a model's tokens, cut to its context length.

    Raises:
        InputError: the tokenizer's files are damaged.
    """
    if tokenizer.name is None:
        return WrittenTokenizer(_clip_files(text))
    files, note = tokenizer.for_transformers(), None
    if not files:
        return WrittenTokenizer({})
    settings = json.loads(files[TOKENIZER_CONFIG]) | {"model_max_length": text.context_length}
    if siglip:  # whose text tower works on the padding as well
        settings |= {"model_input_names": ["input_ids"]}
    kwargs = dict(text.tokenizer_kwargs)
    settings[_OPENCLIP_KEY] = {"hf_tokenizer_name": tokenizer.name}
    if kwargs:
        settings[_OPENCLIP_KEY]["tokenizer_kwargs"] = kwargs
    clean = kwargs.get("clean")
    if clean in _NORMALIZERS:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            saved = find_tokenizer(Path(folder))
            if not _is_sentencepieces_own(saved):
                content = with_cleaning(as_tokenizer_json(saved), clean)
                files[TOKENIZER_JSON] = content
                settings |= _generic_settings(saved, content)
            elif saved.kind != SIGLIP:  # which cleans by itself
                note = (
                    f"texts are not cleaned by {clean!r} in transformers, as its {saved.kind} "
                    f"reads {saved.file.name}: clean them before, or bring a tokenizer.json"
                )
    return WrittenTokenizer(files | {TOKENIZER_CONFIG: _json(settings)}, note)


def _generic_settings(saved: SavedTokenizer, tokenizer_json: bytes) -> Json:
    """Those of the class that takes all from tokenizer.json: others make a normalizer of their own,
    and know how to pad."""
    vocabulary = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    pads = (pad for pad in saved.pad_tokens if vocabulary.token_to_id(pad) is not None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left" if saved.pads_left else "right",
        "pad_token": next(pads, None),
    }


def _is_sentencepieces_own(saved: SavedTokenizer) -> bool:
    """Whether only SentencePiece itself gives its tokens."""
    return saved.is_sentencepiece and saved.kind in SENTENCEPIECE_TOKENIZERS


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
