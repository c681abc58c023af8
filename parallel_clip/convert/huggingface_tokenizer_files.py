"""The tokenizer of a Hugging Face folder: which of ours it is, and the files to write."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from parallel_clip.convert.zero_shot_pipeline import pipeline_line
from parallel_clip.data.samples.clean_text import text_cleaner
from parallel_clip.data.samples.huggingface_tokenizer import as_tokenizer_json
from parallel_clip.data.samples.saved_tokenizer import (
    SIGLIP,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    SavedTokenizer,
    find_tokenizer,
    has_tokenizer,
    pads_left,
    read_settings,
)
from parallel_clip.data.samples.sentencepiece_tokenizer import SENTENCEPIECE_TOKENIZERS
from parallel_clip.data.samples.tokenizer import clip_vocabulary
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.json_file import read_json_object
from parallel_clip.model.towers.text import TextConfig

Json = dict[str, Any]

_VOCABULARY, _MERGES, _ADDED = "vocab.json", "merges.txt", "added_tokens.json"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LISTS_OF_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
# A key of ours in the settings: what OpenCLIP's text_cfg says of the tokenizer.
_OPENCLIP_KEY = "open_clip"


class FolderTokenizerChoice(NamedTuple):
    """choice: as `data.tokenizer`; text_cfg: OpenCLIP's keys that name it; notes: what to tell."""

    choice: str
    text_cfg: Json
    notes: tuple[str, ...] = ()


def tokenizer_of_folder(folder: Path, *, siglip: bool) -> FolderTokenizerChoice:
    """The tokenizer in the folder of a CLIPModel or SiglipModel.

    Raises:
        InputError: one of its files is damaged.
    """
    vocabulary = _read_vocabulary(folder)
    if vocabulary is None and not has_tokenizer(folder) and not siglip:
        note = f"{folder} holds no tokenizer; CLIP's own is taken"
        return FolderTokenizerChoice("openclip", {}, (note,))
    clips_own = _clip_numbers()
    if vocabulary == clips_own and _named_tokens(folder) <= clips_own.keys():
        return FolderTokenizerChoice("openclip", {})
    settings, notes = read_settings(folder), []
    if vocabulary is not None and not has_tokenizer(folder):
        notes.append(
            f"{folder} has {_VOCABULARY} and other tokens than CLIP's, which are not read; where "
            "transformers is installed, AutoTokenizer.from_pretrained(FOLDER)"
            f".save_pretrained(FOLDER) writes {TOKENIZER_JSON}, which is"
        )
    if not siglip and settings.get("model_input_names") != ["input_ids"] and pads_left(folder):
        notes.append(
            f"the tokenizer in {folder} pads on the left: transformers masks the padding, and "
            "OpenCLIP's text tower, which the model is read as, works on it: features of texts "
            "differ from those of transformers"
        )
    own = settings.get(_OPENCLIP_KEY)
    if isinstance(own, Mapping) and own.keys() <= {"hf_tokenizer_name", "tokenizer_kwargs"}:
        return FolderTokenizerChoice(str(folder), dict(own), tuple(notes))
    name = folder.resolve().name
    return FolderTokenizerChoice(str(folder), {"hf_tokenizer_name": name}, tuple(notes))


def _clip_numbers() -> dict[str, int]:
    """CLIP's tokens with their numbers, start and end as transformers spells them."""
    tokens, _ = clip_vocabulary()
    return {token: number for number, token in enumerate([*tokens, _START, _END])}


def _read_vocabulary(folder: Path) -> Mapping[str, int] | None:
    if (folder / TOKENIZER_JSON).exists():
        model = read_json_object(folder / TOKENIZER_JSON).get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        return vocabulary if isinstance(vocabulary, Mapping) else None
    return read_json_object(folder / _VOCABULARY) if (folder / _VOCABULARY).exists() else None


def _named_tokens(folder: Path) -> set[str]:
    """The tokens that a tokenizer's files add to its vocabulary, or give a role."""
    settings = read_settings(folder)
    listed = [settings.get(key) for key in _LISTS_OF_TOKENS]
    listed.append([value for key, value in settings.items() if key.endswith("_token")])
    if (folder / TOKENIZER_JSON).exists():
        listed.append(read_json_object(folder / TOKENIZER_JSON).get("added_tokens"))
    if (folder / _ADDED).exists():
        listed.append([*read_json_object(folder / _ADDED)])
    found = set()
    for tokens in listed:
        if isinstance(tokens, Mapping):
            tokens = tokens.values()
        for token in tokens if isinstance(tokens, Iterable) else ():
            text = token.get("content") if isinstance(token, Mapping) else token
            found |= {text} if isinstance(text, str) else set()
    return found


class WrittenTokenizer(NamedTuple):
    """files by their names, none where the tokenizer's own are not at hand; notes: what to tell."""

    files: dict[str, bytes]
    notes: tuple[str, ...] = ()


def huggingface_tokenizer(
    tokenizer: TokenizerFiles, text: TextConfig, *, siglip: bool
) -> WrittenTokenizer:
    """What AutoTokenizer needs to give a model's tokens, cut to its context length.

    Raises:
        InputError: the tokenizer's files are damaged, or its cleaning of texts is none of
            OpenCLIP's.
    """
    if tokenizer.name is None:
        return _clip_tokenizer(text)
    files = tokenizer.for_transformers()
    if not files:
        return WrittenTokenizer({})
    settings = json.loads(files[TOKENIZER_CONFIG]) | {
        "model_max_length": text.context_length,
        "model_input_names": ["input_ids"],  # without a mask: OpenCLIP's towers work on padding
    }
    kwargs, notes = dict(text.tokenizer_kwargs), []
    settings[_OPENCLIP_KEY] = {"hf_tokenizer_name": tokenizer.name}
    if kwargs:
        settings[_OPENCLIP_KEY]["tokenizer_kwargs"] = kwargs
    clean = kwargs.get("clean", "whitespace")  # OpenCLIP's default
    text_cleaner(clean)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        saved = find_tokenizer(Path(folder))
        if not _is_sentencepieces_own(saved):
            content = with_cleaning(as_tokenizer_json(saved), clean)
            files[TOKENIZER_JSON] = content
            settings |= _generic_settings(saved, content)
        elif saved.kind != SIGLIP:  # which cleans by itself
            notes.append(
                f"texts are not cleaned by {clean!r} in transformers, as its {saved.kind} "
                f"reads {saved.file.name}: clean them before, or bring a tokenizer.json"
            )
    if saved.pads_left and not siglip:
        notes.append(
            "the tokenizer pads on the left, and the text tower works on the padding: call "
            'AutoTokenizer\'s with padding="max_length"; padding to the longest text, as the '
            "zero-shot pipeline does for a CLIPModel, gives other features: with `classify` the "
            f"pipeline, write: {pipeline_line(padding='max_length')}"
        )
    return WrittenTokenizer(files | {TOKENIZER_CONFIG: _json(settings)}, tuple(notes))


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


def _clip_tokenizer(text: TextConfig) -> WrittenTokenizer:
    vocabulary = _clip_numbers()
    if text.vocab_size < len(vocabulary):
        note = (
            f"no tokenizer is written: the model has {text.vocab_size:,} tokens, CLIP's own "
            f"tokenizer {len(vocabulary):,}; put the files of the model's own into the folder, "
            "without which AutoTokenizer makes one of two tokens"
        )
        return WrittenTokenizer({}, (note,))
    _, merges = clip_vocabulary()
    ends = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length}
    files = {
        _VOCABULARY: _json(vocabulary, indent=None),
        _MERGES: "".join(f"{line}\n" for line in lines).encode(),
        SPECIAL_TOKENS: _json(ends),
        TOKENIZER_CONFIG: _json(settings | ends),
    }
    return WrittenTokenizer(files)


def _replaced(pattern: str, content: str) -> Json:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


_WHITESPACE = [
    _replaced(r"\s+", " "),
    {"type": "Strip", "strip_left": True, "strip_right": True},
]
_LOWER = [{"type": "Lowercase"}, *_WHITESPACE]
_PUNCTUATION = "".join(f"\\{mark}" for mark in string.punctuation if mark != "_")
# OpenCLIP's cleaning of texts in the `tokenizers` library's own steps, without the repair of broken
# encodings and of HTML.
_NORMALIZERS: dict[str, list[Json]] = {
    "whitespace": _WHITESPACE,
    "lower": _LOWER,
    "canonicalize": [_replaced("_", " "), _replaced(f"[{_PUNCTUATION}]", ""), *_LOWER],
}


def with_cleaning(tokenizer_json: bytes, clean: str) -> bytes:
    """A tokenizer.json that cleans texts before anything else, by the name of one of OpenCLIP's
    cleanings. Itself where it does so already."""
    content = json.loads(tokenizer_json)
    first, rest = _NORMALIZERS[clean], content.get("normalizer")
    steps = rest.get("normalizers", [rest]) if rest else []
    if steps[: len(first)] == first:
        return tokenizer_json
    content["normalizer"] = {"type": "Sequence", "normalizers": [*first, *steps]}
    return _json(content, indent=None)


def _json(content: Json, indent: int | None = 2) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
