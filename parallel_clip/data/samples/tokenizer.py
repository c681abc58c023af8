"""Tokenizers of captions, equal to OpenCLIP's.

Two kinds: CLIP's own byte-pair encoding, whose merges come with this package, and what a folder of
a Hugging Face tokenizer, or a SentencePiece model, holds. Neither needs a network.
"""

import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

from parallel_clip.data.samples.clean_text import text_cleaner
from parallel_clip.data.samples.huggingface_tokenizer import HuggingFaceTokenizer
from parallel_clip.data.samples.saved_tokenizer import (
    SIGLIP,
    SavedTokenizer,
    find_tokenizer,
    has_tokenizer,
)
from parallel_clip.data.samples.sentencepiece_model import MissingLibraryError
from parallel_clip.data.samples.sentencepiece_tokenizer import (
    SENTENCEPIECE_TOKENIZERS,
    SentencePieceTokenizer,
)
from parallel_clip.errors import InputError

_CLIP_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# T5's for its own training, which no caption needs: mT5's file has 100 above SigLIP's 250,000.
_SENTINEL = re.compile("\u2581?<extra_id_[0-9]+>")


class Tokenizer(Protocol):
    """Turns captions into tokens."""

    context_length: int
    vocab_size: int  # every token is below
    path: Path | None  # of a folder or a SentencePiece model, None for CLIP's own
    notes: tuple[str, ...]  # what to tell of it

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
    tokenizer, or a SentencePiece model, or None for the one that the model names, whose files are
    then in `folder` (that of the checkpoint). InputError if it is not at hand, or has tokens that
    the model has not.
    """
    if choice == "openclip" or (choice is None and text.tokenizer is None):
        tokenizer: Tokenizer = ClipTokenizer(text.context_length, **_known_options(text, "clean"))
    else:
        chosen = Path(choice) if choice else _folder_of(text.tokenizer, folder)
        options = _known_options(text, "clean", "strip_sep_token") if text.tokenizer else {}
        tokenizer = FolderTokenizer(
            chosen, text.context_length, **options, model_vocabulary=text.vocab_size
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.path or 'openclip'} has {tokenizer.vocab_size:,} tokens, "
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

    path = None
    notes = ()

    def __init__(self, context_length: int, clean: str = "lower"):
        self.context_length = context_length
        self._clean = text_cleaner(clean)
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
    """The tokenizer of a folder as Hugging Face has them, or of a SentencePiece model.

    model_vocabulary: how many tokens the model has. Above it there may be sentinels of T5's, which
    become the unknown token where a caption spells one.

    Raises:
        InputError: there is none in `path`, it is damaged, or it lacks a token that is needed.
    """

    def __init__(
        self,
        path: Path,
        context_length: int,
        clean: str = "whitespace",
        strip_sep_token: bool = False,
        model_vocabulary: int | None = None,
    ):
        self.path = path
        self.context_length = context_length
        self._clean = text_cleaner(clean)
        self._saved = saved = find_tokenizer(path)
        self._splitter = _open_splitter(saved, context_length)
        self._pad = self._special_token("pad", *saved.pad_tokens)
        self._stripped = self._special_token("sep", "[SEP]", "</s>") if strip_sep_token else None
        self.vocab_size = self._splitter.size
        self._unknown = None
        if model_vocabulary is not None and self._has_only_sentinels_above(model_vocabulary):
            self._unknown = self._special_token("unk", "<unk>", "[UNK]")
            self.vocab_size = model_vocabulary

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._saved.is_assumed:
            return ()
        text = "lower case, no punctuation" if self._saved.kind == SIGLIP else "the text as it is"
        pad = self._saved.special_token("pad")
        said = f"{self._saved.file} is read as {self._saved.kind}: {text}, padded with {pad}"
        return (f"tokenizer: {said}",)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        result = torch.full((len(texts), self.context_length), self._pad, dtype=torch.int64)
        for row, text in zip(result, texts, strict=True):
            tokens = self._splitter.encode(self._clean(text))
            start = self.context_length - len(tokens) if self._saved.pads_left else 0
            row[start : start + len(tokens)] = torch.tensor(tokens)
        if self._unknown is not None:
            result[result >= self.vocab_size] = self._unknown
        if self._stripped is not None:
            result[result == self._stripped] = 0
        return result

    def _special_token(self, kind: str, *usual: str) -> int:
        named = self._saved.special_token(kind)
        for name in [named] if named else usual:
            number = self._splitter.number(name)
            if number is not None:
                return number
        raise InputError(
            f"the tokenizer {self.path} has no {kind} token ({named or ' or '.join(usual)}) among "
            f"its {self._splitter.size:,}; {self._saved.advice(kind)}"
        )

    def _has_only_sentinels_above(self, vocabulary: int) -> bool:
        above = range(vocabulary, self._splitter.size)
        return bool(above) and all(_SENTINEL.fullmatch(self._splitter.token(n)) for n in above)


def check_tokenizer(path: Path) -> None:
    """Read the files of a tokenizer and split a text with it. Where SentencePiece would have to
    and is not installed, its model is not read.

    Raises:
        InputError: there is none in `path`, or it is damaged.
    """
    try:
        _open_splitter(find_tokenizer(path), context_length=77)
    except MissingLibraryError:
        pass


def _open_splitter(
    saved: SavedTokenizer, context_length: int
) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    kind = SENTENCEPIECE_TOKENIZERS.get(saved.kind) if saved.is_sentencepiece else None
    try:
        splitter = (kind or HuggingFaceTokenizer)(saved, context_length)
        splitter.encode("a photo of a dog")  # some damage shows only here
    except BaseException as error:
        # Of damaged files, and settings of wrong types, the libraries make nearly anything; a
        # panic of `tokenizers` is not even an Exception.
        if isinstance(error, InputError | KeyboardInterrupt | SystemExit):
            raise
        reason = str(error) if type(error) is Exception else repr(error)
        raise InputError(f"the tokenizer in {saved.path} cannot be read: {reason}") from None
    return splitter


def _folder_of(name: str, beside: Path | None) -> Path:
    """Where the files of the tokenizer that a model names are: beside the checkpoint, or in a local
    folder of that name."""
    for folder in (beside, Path(name)):
        if folder is not None and has_tokenizer(folder):
            return folder
    raise InputError(
        f"the model takes the tokenizer {name}, which is not here; on a machine with a network run "
        f"hf download {name} --include 'tokenizer*' --include 'special*' --include 'vocab.txt' "
        "--include spiece.model --local-dir FOLDER, bring FOLDER here and set "
        "data.tokenizer=FOLDER"
    )


def _known_options(text: TextSettings, *known: str) -> dict[str, Any]:
    for key in text.tokenizer_kwargs:
        if key not in known:
            raise InputError(
                f"text_cfg.tokenizer_kwargs.{key} of the model is not supported; there are {known}"
            )
    return dict(text.tokenizer_kwargs)


def _byte_characters() -> list[str]:
    """For each byte a printable character: itself, or one from 256 on where it is not printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (number for number in range(256) if number not in printable)
    replaced = {byte: 256 + number for number, byte in enumerate(others)}
    return [chr(replaced.get(byte, byte)) for byte in range(256)]
