"""Tokens by SentencePiece itself, as transformers' SiglipTokenizer and GemmaTokenizer give them."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from parallel_clip.data.samples.saved_tokenizer import GEMMA, SIGLIP, SIGLIP2, SavedTokenizer
from parallel_clip.data.samples.sentencepiece_model import (
    CONTROL,
    USER_DEFINED,
    SentencePieceModel,
)
from parallel_clip.errors import InputError

_SPACE = "\u2581"  # what SentencePiece writes for a space
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SentencePieceTokenizer:
    """What the classes have in common: texts of special tokens are taken out first, what is between
    them is split by SentencePiece, and the result is cut to leave room for start and end.

    size: of the vocabulary.
    """

    def __init__(
        self,
        saved: SavedTokenizer,
        model: SentencePieceModel,
        context_length: int,
        special: list[str],
    ):
        self._saved = saved
        self._context_length = context_length
        self._pieces = model.processor
        self.size = self._pieces.get_piece_size()
        found = {t for t in special + self._added_tokens() if self.number(t) is not None}
        longest_first = sorted(found, key=len, reverse=True)
        self._special = {token: self._pieces.piece_to_id(token) for token in longest_first}
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        """At most `context_length` tokens, with start and end as the class has them."""
        raise NotImplementedError

    def token(self, number: int) -> str:
        return self._pieces.id_to_piece(number)

    def number(self, token: str) -> int | None:
        """Of a piece; None where there is no such one."""
        number = self._pieces.piece_to_id(token)
        return number if self._pieces.id_to_piece(number) == token else None

    def special_number(self, kind: str, usual: str) -> int:
        """Of the token that the settings name, or of the class's usual one."""
        name = self._saved.special_token(kind) or usual
        number = self.number(name)
        if number is None:
            raise InputError(
                f"{self._saved.file} has no {kind} token {name} among its {self.size:,} pieces; "
                f"{self._saved.advice(kind)}"
            )
        return number

    def _split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The parts of a text in order: text with None, or a special token with its number."""
        parts = self._pattern.split(text) if self._special else [text]
        return ((part, self._special.get(part)) for part in parts if part)

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        if self._saved.truncation_side == "left":
            return tokens[max(0, len(tokens) - room) :]
        return tokens[:room]

    def _added_tokens(self) -> list[str]:
        """Those that the settings list, which have to be pieces of the model."""
        settings = self._saved.settings
        listed = [
            *(settings.get("added_tokens_decoder") or {}).values(),
            *(settings.get("additional_special_tokens") or []),
        ]
        added = [token["content"] if isinstance(token, dict) else token for token in listed]
        unknown = [token for token in added if self.number(token) is None]
        if unknown:
            raise InputError(
                f"{self._saved.path} adds {len(unknown)} tokens to the {self.size:,} pieces of "
                f"{self._saved.file.name} ({', '.join(unknown[:3])}); where transformers is "
                "installed, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes "
                "tokenizer.json, which has them all"
            )
        return added


class SiglipTokenizer(SentencePieceTokenizer):
    """SigLIP's: lower case, no ASCII punctuation, and the end token, which is the padding, too."""

    def __init__(self, saved: SavedTokenizer, context_length: int):
        usual = {"eos": "</s>", "pad": "</s>", "unk": "<unk>"}
        named = {kind: saved.special_token(kind) or name for kind, name in usual.items()}
        model = SentencePieceModel(saved.file)
        super().__init__(saved, model, context_length, list(named.values()))
        self._end = self.special_number("eos", usual["eos"])
        self._lowers = saved.settings.get("do_lower_case", True)
        self._space = self._pieces.piece_to_id(_SPACE)
        # Transformers puts the unknown token before each part and drops its pieces again, which
        # matters where a part begins in the middle of a word.
        self._before = named["unk"]
        self._before_length = len(self._pieces.encode(self._before))

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part, special in self._split(_SPACE + text.replace(_SPACE, " ")):
            if special is None:
                tokens += self._split_part(part)
            elif tokens == [self._space]:
                tokens = [special]
            else:
                tokens.append(special)
        tokens = self._cut(tokens, self._context_length - 1)
        return tokens if tokens[-1:] == [self._end] else [*tokens, self._end]

    def _split_part(self, text: str) -> list[int]:
        if self._lowers:
            text = text.lower()
        text = " ".join(text.translate(_NO_PUNCTUATION).split())
        tokens = self._pieces.encode(self._before + text)
        return tokens[self._before_length :] if len(tokens) >= self._before_length else tokens


class GemmaTokenizer(SentencePieceTokenizer):
    """Gemma's: the text as it stands; start and end where the settings ask for them.

    SigLIP 2's is the same with the text in lower case. Capitals that spell a symbol of the model in
    lower case, <H1>, become that symbol; transformers splits them.
    """

    def __init__(self, saved: SavedTokenizer, context_length: int):
        model = SentencePieceModel(saved.file)
        if not model.is_plain_bpe:
            raise InputError(
                f"{saved.path} names {saved.kind}, but {saved.file.name} is not a byte-pair model "
                "of plain text as Gemma's is; it may be another model's file"
            )
        usual = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
        named = [saved.special_token(kind) or name for kind, name in usual.items()]
        # Symbols, too: transformers finds them before a space becomes a piece, SentencePiece after.
        symbols = model.pieces_of_type(CONTROL, USER_DEFINED)
        super().__init__(saved, model, context_length, named + symbols)
        self._lowers = saved.kind == SIGLIP2
        self._start, self._end = (
            [self.special_number(kind, usual[kind])]
            if saved.settings.get(f"add_{kind}_token")
            else []
            for kind in ("bos", "eos")
        )

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part, special in self._split(text):
            if special is not None:
                tokens.append(special)
            else:
                tokens += self._pieces.encode(_lower(part) if self._lowers else part)
        room = self._context_length - len(self._start) - len(self._end)
        return self._start + self._cut(tokens, room) + self._end


def _lower(text: str) -> str:
    """Each letter by itself, as `tokenizers` does: a final sigma has another form in Python."""
    return "".join(letter.lower() for letter in text)


SENTENCEPIECE_TOKENIZERS = {SIGLIP: SiglipTokenizer, GEMMA: GemmaTokenizer, SIGLIP2: GemmaTokenizer}
