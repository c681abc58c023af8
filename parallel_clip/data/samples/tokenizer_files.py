"""The files of a Hugging Face tokenizer, which travel with the model that needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel_clip.errors import InputError

TOKENIZER_JSON, BERT_VOCABULARY = "tokenizer.json", "vocab.txt"
# The second has the last word.
SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
_FILES = (
    TOKENIZER_JSON,
    BERT_VOCABULARY,
    *SETTINGS_FILES,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (TOKENIZER_JSON, BERT_VOCABULARY))


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files by their names; none where they are not at hand, or it is CLIP's own.

    name: what a model config calls it, None for CLIP's own.
    """

    name: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> TokenizerFiles:
        """The tokenizer in `folder`; without a `name` it is called by the folder's.

        Raises:
            InputError: a file cannot be read.
        """
        try:
            files = {f: (folder / f).read_bytes() for f in _FILES if (folder / f).is_file()}
        except OSError as error:
            raise InputError(f"the tokenizer in {folder} cannot be read: {error}") from None
        return cls(name or folder.resolve().name, files)

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
        settings: dict[str, Any] = {}
        for name in SETTINGS_FILES:
            try:
                settings |= json.loads(self.files.get(name, b"{}"))
            except (ValueError, TypeError) as error:
                raise InputError(f"{name} of the tokenizer cannot be read: {error}") from None
        fast = TOKENIZER_JSON in self.files
        settings.setdefault("tokenizer_class", f"{'PreTrained' if fast else 'Bert'}TokenizerFast")
        for key, value in settings.items():
            if isinstance(value, dict) and "content" in value and "__type" not in value:
                settings[key] = value["content"]
        if "pad_token" not in settings:
            text = self.files[TOKENIZER_JSON if fast else BERT_VOCABULARY]
            pad = next((p for p in ("[PAD]", "<pad>") if p.encode() in text), None)
            settings |= {"pad_token": pad} if pad else {}
        written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return dict(self.files) | {SETTINGS_FILES[1]: written.encode()}
