"""Tokens by the `tokenizers` library, as transformers' classes that are built on it give them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import Unigram

from parallel_clip.data.samples.saved_tokenizer import (
    BERT_VOCABULARY,
    SIGLIP2,
    T5,
    TOKENIZER_JSON,
    SavedTokenizer,
)
from parallel_clip.data.samples.sentencepiece_model import (
    CONTROL,
    USER_DEFINED,
    SentencePieceModel,
)
from parallel_clip.errors import InputError
from parallel_clip.json_file import read_json_object

_SPECIAL = ("bos", "eos", "unk", "sep", "cls", "mask")


class HuggingFaceTokenizer:
    """The tokenizer of tokenizer.json, of BERT's vocab.txt, or of T5's spiece.model.

    size: of the vocabulary. On a damaged file the library raises nearly anything, which
    `FolderTokenizer` turns into InputError.
    """

    def __init__(self, saved: SavedTokenizer, context_length: int):
        self._tokenizer = _load(saved)
        pads = [p for p in saved.pad_tokens if self._tokenizer.token_to_id(p) is not None]
        _make_special(self._tokenizer, *map(saved.special_token, _SPECIAL), *pads[:1])
        self._tokenizer.enable_truncation(context_length, direction=saved.truncation_side)
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """At most `context_length` tokens, with those that are put around a text."""
        # One by one: encode_batch starts threads, which a process that forks later must not have.
        return self._tokenizer.encode(text).ids

    def token(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or ""

    def number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def as_tokenizer_json(saved: SavedTokenizer) -> bytes:
    """A tokenizer.json that gives the tokens of `HuggingFaceTokenizer` whatever class reads it."""
    return _load(saved).to_str().encode()


def _load(saved: SavedTokenizer) -> tokenizers.Tokenizer:
    if saved.is_sentencepiece:
        return _t5_from_sentencepiece(saved)
    if saved.file.name == BERT_VOCABULARY:
        bert = BertWordPieceTokenizer(
            str(saved.file),
            lowercase=saved.settings.get("do_lower_case", True),
            strip_accents=saved.settings.get("strip_accents"),
            handle_chinese_chars=saved.settings.get("tokenize_chinese_chars", True),
        )
        return tokenizers.Tokenizer.from_str(bert.to_str())
    assert saved.file.name == TOKENIZER_JSON
    if saved.kind == T5:
        return _t5_from_json(saved)
    tokenizer = tokenizers.Tokenizer.from_file(str(saved.file))
    if saved.kind == SIGLIP2:
        lower = [normalizers.Lowercase(), *filter(None, [tokenizer.normalizer])]
        tokenizer.normalizer = normalizers.Sequence(lower)
    return tokenizer


def _t5_from_json(saved: SavedTokenizer) -> tokenizers.Tokenizer:
    """T5Tokenizer takes the vocabulary, the added tokens and the map of characters from
    tokenizer.json and has the rest itself: files of transformers 4.57 miss the first space."""
    stored = read_json_object(saved.file)
    added = [
        AddedToken(**{key: value for key, value in token.items() if key != "id"})
        for token in stored.get("added_tokens", [])
    ]
    vocabulary = [(piece, score) for piece, score in stored["model"]["vocab"]]
    return _t5(saved, vocabulary, _characters_map(stored.get("normalizer")), added)


def _characters_map(normalizer: dict[str, Any] | None) -> bytes:
    """That of a normalizer in tokenizer.json; empty where there is none."""
    normalizer = normalizer or {}
    parts = normalizer.get("normalizers", [normalizer])
    maps = [p["precompiled_charsmap"] for p in parts if p.get("type") == "Precompiled"]
    return base64.b64decode(maps[0]) if maps else b""


def _t5_from_sentencepiece(saved: SavedTokenizer) -> tokenizers.Tokenizer:
    model = SentencePieceModel(saved.file)
    control = model.pieces_of_type(CONTROL)
    added = [
        AddedToken(piece, normalized=False, special=piece in control)
        for piece in model.pieces_of_type(CONTROL, USER_DEFINED)
    ]
    sentinels = [(token, 0.0) for token in reversed(_sentinels(saved))]
    return _t5(saved, model.pieces + sentinels, model.characters_map, added)


def _t5(
    saved: SavedTokenizer,
    vocabulary: Sequence[tuple[str, float]],
    characters_map: bytes,
    added: Iterable[AddedToken],
) -> tokenizers.Tokenizer:
    # T5Tokenizer has these numbers, and no fallback to bytes, whatever the model says.
    tokenizer = tokenizers.Tokenizer(Unigram(list(vocabulary), unk_id=2, byte_fallback=False))
    if characters_map:
        tokenizer.normalizer = normalizers.Precompiled(characters_map)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.add_tokens(list(added))
    sentinels = _sentinels(saved)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in sentinels])
    end = saved.special_token("eos") or "</s>"
    number = tokenizer.token_to_id(end)
    if number is None:
        raise InputError(
            f"{saved.file} has no eos token {end} among its {len(vocabulary):,} pieces; "
            f"{saved.advice('eos')}"
        )
    _make_special(tokenizer, "</s>", "<unk>", "<pad>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, number)]
    )
    return tokenizer


def _make_special(tokenizer: tokenizers.Tokenizer, *tokens: str | None) -> None:
    """Take tokens of the vocabulary for special ones, so that they are found in a text."""
    already = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token in tokens
            if token not in already
            and token is not None
            and tokenizer.token_to_id(token) is not None
        ]
    )


def _sentinels(saved: SavedTokenizer) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(saved.settings.get("extra_ids", 100))]
