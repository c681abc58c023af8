"""Tokenizers of captions, equal to OpenCLIP's.

Two kinds: CLIP's own byte-pair encoding, whose merges come with this package, and the folder of a
Hugging Face tokenizer. Both run on the `tokenizers` library; neither needs a network.
"""

import gzip
import html
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import ftfy
import regex
import tokenizers
import torch
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import BPE
from torch import Tensor

from parallel_clip.data.samples.tokenizer_files import (
    BERT_VOCABULARY,
    SETTINGS_FILES,
    TOKENIZER_JSON,
    has_tokenizer,
)
from parallel_clip.errors import InputError

_CLIP_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class Tokenizer(Protocol):
    """Turns captions into tokens."""

    context_length: int
    vocab_size: int  # every token is below
    folder: Path | None  # of a Hugging Face tokenizer, None for CLIP's own

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n texts to int64 [n, context_length], cut or padded."""


class TextSettings(Protocol):
    """The settings of a text tower that a tokenizer needs; see model/towers/text.py."""

    context_length: int
    vocab_size: int
    tokenizer: str | None
    tokenizer_kwargs: Mapping[str, Any]


def build_tokenizer(choice: str | None, text: TextSettings, folder: Path | None) -> Tokenizer:
    """The tokenizer of a model.

    `choice` is `data.tokenizer`: "openclip" for CLIP's own, or the folder of a Hugging Face
    tokenizer, or None for the one that the model names, whose files are then in `folder` (that of
    the checkpoint). InputError if it is not at hand, or has tokens that the model has not.
    """
    if choice == "openclip" or (choice is None and text.tokenizer is None):
        tokenizer: Tokenizer = ClipTokenizer(text.context_length, **_known_options(text, "clean"))
    else:
        chosen = Path(choice) if choice else _folder_of(text.tokenizer, folder)
        options = _known_options(text, "clean", "strip_sep_token") if text.tokenizer else {}
        tokenizer = FolderTokenizer(chosen, text.context_length, **options)
    if tokenizer.vocab_size > text.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.folder or 'openclip'} has {tokenizer.vocab_size:,} tokens, "
            f"the model's vocabulary {text.vocab_size:,}; set data.tokenizer to the model's own"
        )
    return tokenizer


@dataclass(frozen=True)
class TokenizerSource:
    """Which tokenizer a run uses, as data: each rank builds it. As `build_tokenizer`."""

    choice: str | None
    folder: Path | None

    def build(self, text: TextSettings) -> Tokenizer:
        return build_tokenizer(self.choice, text, self.folder)


class ClipTokenizer:
    """CLIP's byte-pair encoding: start, the text's tokens, end, then zeros."""

    folder = None

    def __init__(self, context_length: int, clean: str = "lower"):
        self.context_length = context_length
        self._clean = _cleaner(clean)
        tokens, merges = clip_vocabulary()
        self._characters = _byte_characters()
        vocabulary = {token: number for number, token in enumerate(tokens)}
        self._bpe = BPE(vocabulary, merges, end_of_word_suffix="</w>")
        self._start, self._end = len(tokens), len(tokens) + 1
        self._special = {"<start_of_text>": self._start, "<end_of_text>": self._end}
        self.vocab_size = len(tokens) + 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        result = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(result, texts, strict=True):
            tokens = [self._start, *self.encode(text)[: self.context_length - 2], self._end]
            row[: len(tokens)] = torch.tensor(tokens)
        return result

    def encode(self, text: str) -> list[int]:
        """All tokens of a text, without start and end."""
        tokens: list[int] = []
        for word in _CLIP_WORDS.findall(self._clean(text)):
            if word in self._special:
                tokens.append(self._special[word])
            else:
                letters = "".join(self._characters[byte] for byte in word.encode())
                tokens += [token.id for token in self._bpe.tokenize(letters)]
        return tokens


def clip_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """CLIP's tokens in the order of their numbers, without start and end, which come last; and the
    pairs that its byte-pair encoding merges, the first in rank first."""
    packed = resources.files("parallel_clip.data.samples") / "vocabulary/clip_merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    letters = sorted(_byte_characters())
    ends = [letter + "</w>" for letter in letters]
    return letters + ends + ["".join(merge) for merge in merges], merges


class FolderTokenizer:
    """A Hugging Face tokenizer: `tokenizer.json` or BERT's `vocab.txt`, and what is beside it."""

    def __init__(
        self,
        folder: Path,
        context_length: int,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
    ):
        self.folder = folder
        self.context_length = context_length
        self._clean = _cleaner(clean)
        settings = _settings(folder)
        self._tokenizer = _load(folder, settings)
        pad = self._special_token("pad", settings, "[PAD]", "<pad>")
        self._stripped = None
        if strip_sep_token:
            self._stripped = self._special_token("sep", settings, "[SEP]", "</s>")
        self._tokenizer.enable_truncation(
            context_length, direction=settings.get("truncation_side", "right")
        )
        self._tokenizer.enable_padding(
            length=context_length, pad_id=pad, direction=settings.get("padding_side", "right")
        )
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        # One by one: encode_batch starts threads, which a process that forks later must not have.
        rows = [self._tokenizer.encode(self._clean(text)).ids for text in texts]
        result = torch.tensor(rows, dtype=torch.int64).view(len(texts), self.context_length)
        if self._stripped is not None:
            result[result == self._stripped] = 0
        return result

    def _special_token(self, kind: str, settings: Mapping[str, Any], *usual: str) -> int:
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        for name in [token] if token else usual:
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return number
        raise InputError(
            f"the tokenizer in {self.folder} has no {kind} token; name one that its vocabulary has "
            f'as "{kind}_token" in {self.folder / "tokenizer_config.json"}'
        )


def _load(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        if (folder / TOKENIZER_JSON).is_file():
            return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        if (folder / BERT_VOCABULARY).is_file():
            bert = BertWordPieceTokenizer(
                str(folder / BERT_VOCABULARY),
                lowercase=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            )
            return tokenizers.Tokenizer.from_str(bert.to_str())
    except Exception as error:  # the library raises plain Exception on a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read: {error}") from None
    raise InputError(
        f"data.tokenizer: {folder} has neither tokenizer.json nor vocab.txt; where transformers is "
        "installed, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes the former"
    )


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in SETTINGS_FILES:
        file = folder / name
        if file.is_file():
            try:
                settings |= json.loads(file.read_text("utf-8"))
            except (ValueError, TypeError) as error:
                raise InputError(f"{file} cannot be read: {error}") from None
    return settings


def _folder_of(name: str, beside: Path | None) -> Path:
    """Where the files of the tokenizer that a model names are: beside the checkpoint, or in a local
    folder of that name."""
    for folder in (beside, Path(name)):
        if folder is not None and has_tokenizer(folder):
            return folder
    raise InputError(
        f"the model takes the tokenizer {name}, which is not here; on a machine with a network run "
        f"hf download {name} --include 'tokenizer*' --include 'special*' --include 'vocab.txt' "
        "--local-dir FOLDER, bring FOLDER here and set data.tokenizer=FOLDER"
    )


def _known_options(text: TextSettings, *known: str) -> dict[str, Any]:
    for key in text.tokenizer_kwargs:
        if key not in known:
            raise InputError(
                f"text_cfg.tokenizer_kwargs.{key} of the model is not supported; there are {known}"
            )
    return dict(text.tokenizer_kwargs)


def _cleaner(kind: str) -> Callable[[str], str]:
    if kind not in _CLEANERS:
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


def _byte_characters() -> list[str]:
    """For each byte a printable character: itself, or one from 256 on where it is not printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (number for number in range(256) if number not in printable)
    replaced = {byte: 256 + number for number, byte in enumerate(others)}
    return [chr(replaced.get(byte, byte)) for byte in range(256)]
