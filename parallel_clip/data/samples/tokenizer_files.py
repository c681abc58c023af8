"""The files of a tokenizer, which travel with the model that needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel_clip.data.samples.saved_tokenizer import (
    BERT_VOCABULARY,
    SENTENCEPIECE_FILES,
    SIGLIP,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    SavedTokenizer,
    find_tokenizer,
    merge_settings,
)
from parallel_clip.errors import InputError
from parallel_clip.json_file import parse_json_object

_FILES = (
    TOKENIZER_JSON,
    BERT_VOCABULARY,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files by their names; none where they are not at hand, or it is CLIP's own.

    name: what a model config calls it, None for CLIP's own.
    """

    name: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> TokenizerFiles:
        """The tokenizer in a folder, or of a SentencePiece model; without a `name` it is called by
        that of `path`. What was found out of it beside these files is written into them.

        Raises:
            InputError: a file cannot be read.
        """
        saved = find_tokenizer(path)
        found = [path / f for f in _FILES] if path.is_dir() else []
        try:
            files = {file.name: file.read_bytes() for file in found if file.is_file()}
            if saved.is_sentencepiece:
                usual = SENTENCEPIECE_FILES[saved.kind or ""]
                files.pop(saved.file.name, None)
                files[usual] = saved.file.read_bytes()
        except OSError as error:
            raise InputError(f"the tokenizer in {path} cannot be read: {error}") from None
        if _names_another_kind(files, saved):
            settings = dict(saved.settings) | {"tokenizer_class": saved.kind}
            files[TOKENIZER_CONFIG] = _json_bytes(settings)
        path = path.resolve()
        return cls(name or (path.name if path.is_dir() else path.stem), files)

    def named_in(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """OpenCLIP's model_cfg with this tokenizer in place of another that it may name."""
        model = deepcopy(dict(model))
        named = model["text_cfg"].pop("hf_tokenizer_name", None)
        if self.name is not None:
            model["text_cfg"]["hf_tokenizer_name"] = self.name
        elif named is not None:
            model["text_cfg"].pop("tokenizer_kwargs", None)  # they are for the other
        return model

    def for_transformers(self) -> dict[str, bytes]:
        """The files, with what transformers' AutoTokenizer asks for and our own reader does not: a
        class, and special tokens that are text.

        Raises:
            InputError: the settings among them are damaged.
        """
        if not self.files:
            return {}
        settings = self._settings()
        if TOKENIZER_JSON in self.files:
            settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
            # It reads this class from a SentencePiece model alone.
            if (
                settings["tokenizer_class"] == SIGLIP
                and SENTENCEPIECE_FILES[SIGLIP] not in self.files
            ):
                settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        elif BERT_VOCABULARY in self.files:
            settings.setdefault("tokenizer_class", "BertTokenizerFast")
        for key, value in settings.items():
            if isinstance(value, dict) and "content" in value and "__type" not in value:
                settings[key] = value["content"]
        text = self.files.get(TOKENIZER_JSON) or self.files.get(BERT_VOCABULARY, b"")
        pad = next((p for p in ("[PAD]", "<pad>") if p.encode() in text), None)
        if "pad_token" not in settings and pad is not None:
            settings["pad_token"] = pad
        return dict(self.files) | {TOKENIZER_CONFIG: _json_bytes(settings)}

    def _settings(self) -> dict[str, Any]:
        names = (SPECIAL_TOKENS, TOKENIZER_CONFIG)
        return merge_settings(*(_object_of(self.files, name) for name in names))


def _names_another_kind(files: Mapping[str, bytes], saved: SavedTokenizer) -> bool:
    """Whether something else than the files that travel has decided on the class."""
    named = _object_of(files, TOKENIZER_CONFIG).get("tokenizer_class") or ""
    return saved.kind is not None and named.removesuffix("Fast") != saved.kind


def _object_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_json_object(files.get(name, b"{}"), f"{name} of the tokenizer")


def _json_bytes(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
