"""Which tokenizer a folder or a SentencePiece model holds.

A folder is read as transformers 5 reads it: `tokenizer_config.json` names a class, and the class
decides which file has the vocabulary and what is done beside splitting. A SentencePiece model that
nothing describes is taken for SigLIP's or SigLIP 2's, as OpenCLIP imports those.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_clip.data.samples.sentencepiece_model import SentencePieceModel
from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object

TOKENIZER_JSON, BERT_VOCABULARY = "tokenizer.json", "vocab.txt"
SPECIAL_TOKENS, TOKENIZER_CONFIG = "special_tokens_map.json", "tokenizer_config.json"

T5, SIGLIP = "T5Tokenizer", "SiglipTokenizer"
GEMMA, SIGLIP2 = "GemmaTokenizer", "Siglip2Tokenizer"

# The classes that are read from a SentencePiece model, with the name that transformers finds it by.
SENTENCEPIECE_FILES = {
    SIGLIP: "spiece.model",
    T5: "spiece.model",
    GEMMA: "tokenizer.model",
    SIGLIP2: "tokenizer.model",
}

# Of a model's config.json, where tokenizer_config.json names no class.
_CLASS_OF_MODEL_TYPE = {"siglip": SIGLIP, "siglip2": SIGLIP2, "t5": T5, "mt5": T5, "gemma": GEMMA}
# Where no padding_side is set.
_PADDED_LEFT = {
    GEMMA,
    SIGLIP2,
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "XLNetTokenizer",
}


_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer on disk.

    path: the folder, or the SentencePiece model itself; file: its vocabulary; kind: the class in
    transformers, without "Fast", None where nothing names one; settings: those of its files and,
    for a model that nothing describes, those that it is taken to have; is_assumed: it is such one.

    Raises:
        InputError: a special token or a side is none.
    """

    path: Path
    file: Path
    kind: str | None
    settings: Mapping[str, Any]
    is_assumed: bool = False

    def __post_init__(self) -> None:
        for kind in _SPECIAL:
            token = self.special_token(kind)
            if token is not None and not isinstance(token, str):
                raise InputError(f"{self.path}: {kind}_token must be a text, not {token!r}")
        _padding_side(self.path, self.settings, self.kind)
        if self.truncation_side not in _SIDES:
            raise InputError(f"{self.path}: truncation_side must be left or right")

    @property
    def is_sentencepiece(self) -> bool:
        return self.file.suffix == ".model"

    @property
    def pad_tokens(self) -> tuple[str, ...]:
        """The one that the settings name, else those that are usual."""
        named = self.special_token("pad")
        if named is not None:
            return (named,)
        return ("</s>",) if self.kind == SIGLIP and self.is_sentencepiece else ("[PAD]", "<pad>")

    @property
    def pads_left(self) -> bool:
        return _padding_side(self.path, self.settings, self.kind) == "left"

    @property
    def truncation_side(self) -> str:
        return self.settings.get("truncation_side", "right")

    def special_token(self, kind: str) -> str | None:
        """The text of the token that the settings name as `{kind}_token`."""
        token = self.settings.get(f"{kind}_token")
        return token.get("content") if isinstance(token, dict) else token

    def advice(self, kind: str) -> str:
        """How to name a special token."""
        where = self.path / TOKENIZER_CONFIG
        if not self.path.is_dir():
            where = f"a {TOKENIZER_CONFIG} beside it, and give the folder of both"
        return f'name one that its vocabulary has as "{kind}_token" in {where}'


def has_tokenizer(path: Path) -> bool:
    """Whether `path` is a folder with a tokenizer, or a file, taken for a SentencePiece model."""
    names = (TOKENIZER_JSON, BERT_VOCABULARY, *SENTENCEPIECE_FILES.values())
    # Path.is_file raises for a name that is too long; a model config may name anything.
    return os.path.isfile(path) or any(os.path.isfile(path / name) for name in names)


def find_tokenizer(path: Path) -> SavedTokenizer:
    """The tokenizer in a folder, or of a SentencePiece model.

    Raises:
        InputError: there is none, its settings cannot be read, or it is only a SentencePiece model
            of a class that is not read from one.
    """
    if path.is_file():
        return _assumed(path, path, {})
    settings = read_settings(path)
    kind = _kind(path, settings)
    model = _sentencepiece_file(path, kind)
    if kind == SIGLIP and model is not None:  # transformers reads this class from nothing else
        return SavedTokenizer(path, model, kind, settings)
    for name in (TOKENIZER_JSON, BERT_VOCABULARY):
        if (path / name).is_file():
            return SavedTokenizer(path, path / name, kind, settings)
    if model is None:
        raise InputError(_nothing_there(path))
    if kind is None:
        return _assumed(path, model, settings)
    if kind not in SENTENCEPIECE_FILES:
        raise InputError(
            f"the tokenizer in {path} is a {kind}, which is not read from {model.name} alone "
            f"({', '.join(SENTENCEPIECE_FILES)} are); where transformers is installed, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
        )
    return SavedTokenizer(path, model, kind, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` and `special_tokens_map.json` say.

    Raises:
        InputError: one of them cannot be read.
    """
    return merge_settings(*(_json(folder / n) for n in (SPECIAL_TOKENS, TOKENIZER_CONFIG)))


def pads_left(folder: Path) -> bool:
    """Whether the tokenizer in a folder puts padding before a text.

    Raises:
        InputError: its settings cannot be read.
    """
    settings = read_settings(folder)
    return _padding_side(folder, settings, _kind(folder, settings)) == "left"


def _padding_side(path: Path, settings: Mapping[str, Any], kind: str | None) -> str:
    side = settings.get("padding_side", "left" if kind in _PADDED_LEFT else "right")
    if side not in _SIDES:
        raise InputError(f"{path}: padding_side must be left or right, not {side!r}")
    return side


def merge_settings(special: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Of both files, the second in rank where it lists the tokens, as newer files do."""
    config = dict(config)
    return dict(special) | config if "added_tokens_decoder" in config else config | dict(special)


def _json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


def _kind(folder: Path, settings: Mapping[str, Any]) -> str | None:
    named = settings.get("tokenizer_class") or ""
    if not isinstance(named, str):
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: tokenizer_class must be a text, not {named!r}"
        )
    named = named.removesuffix("Fast") or None
    model_type = str(_json(folder / "config.json").get("model_type"))  # it may be any tool's
    # Folders of SigLIP 2 name GemmaTokenizer, which transformers overrules: the text is lowered.
    if named is None or model_type == "siglip2":
        return _CLASS_OF_MODEL_TYPE.get(model_type, named)
    return named


def _sentencepiece_file(folder: Path, kind: str | None) -> Path | None:
    names = [*filter(None, [SENTENCEPIECE_FILES.get(kind or "")]), *SENTENCEPIECE_FILES.values()]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _assumed(path: Path, file: Path, settings: Mapping[str, Any]) -> SavedTokenizer:
    """What OpenCLIP's SigLipTokenizer and big_vision make of their vocabularies."""
    model = SentencePieceModel(file)
    if model.is_like_gemma:
        kind, pad = GEMMA, model.special_pieces.get("pad")
        usual = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    else:
        kind, pad = SIGLIP, model.special_pieces.get("eos")
        usual = {"do_lower_case": True}
    tokens = {f"{name}_token": piece for name, piece in model.special_pieces.items()}
    tokens |= {"pad_token": pad} if pad is not None else {}
    usual |= {"tokenizer_class": kind, **tokens}
    return SavedTokenizer(path, file, kind, usual | dict(settings), is_assumed=True)


def _nothing_there(path: Path) -> str:
    if not path.exists():
        return f"data.tokenizer: {path} does not exist (paths start from {Path.cwd()})"
    return (
        f"data.tokenizer: {path} has none of tokenizer.json, vocab.txt, spiece.model and "
        "tokenizer.model; where transformers is installed, "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes the first"
    )
