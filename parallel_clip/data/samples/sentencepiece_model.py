"""A file of SentencePiece: its pieces and how it was trained."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from parallel_clip.errors import InputError

_BPE = 2  # of TrainerSpec.ModelType
CONTROL, USER_DEFINED = 3, 4  # of SentencePiece.Type
_LARGE_FILE_POINTER = b"version https://git-lfs"


class MissingLibraryError(InputError):
    """What reads SentencePiece models is not installed."""


class SentencePieceModel:
    """What a .model file says. Needs the extra `sentencepiece` of this package.

    Raises:
        MissingLibraryError: the libraries are not installed.
        InputError: the file is no SentencePiece model.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            # The second needs protobuf, which the first does not ask for.
            from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        except ImportError as error:
            raise MissingLibraryError(
                f"{file} is read with the libraries sentencepiece and protobuf ({error}); "
                'pip install "parallel_clip[sentencepiece]", or sentencepiece and protobuf'
            ) from None
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
        try:
            self.processor = SentencePieceProcessor()
            self.processor.LoadFromSerializedProto(content)
            self._proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)
        except Exception:  # RuntimeError of the one, DecodeError of the other
            raise InputError(_no_model(file, content)) from None

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """All pieces with their scores, by number."""
        return [(piece.piece, piece.score) for piece in self._proto.pieces]

    @property
    def characters_map(self) -> bytes:
        """How text is normalized, as compiled by SentencePiece; empty where it is not."""
        return self._proto.normalizer_spec.precompiled_charsmap

    @cached_property
    def special_pieces(self) -> dict[str, str]:
        """The pieces that have a role, by it: of pad, bos, eos and unk those that there are."""
        numbers = {
            "pad": self.processor.pad_id(),
            "bos": self.processor.bos_id(),
            "eos": self.processor.eos_id(),
            "unk": self.processor.unk_id(),
        }
        return {role: self.processor.id_to_piece(n) for role, n in numbers.items() if n >= 0}

    def pieces_of_type(self, *types: int) -> list[str]:
        return [piece.piece for piece in self._proto.pieces if piece.type in types]

    @property
    def is_plain_bpe(self) -> bool:
        """Whether it is byte-pair encoding of the text as it stands, as Gemma's is."""
        normalizer = self._proto.normalizer_spec
        changes = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
        changes = changes or normalizer.precompiled_charsmap
        return self._proto.trainer_spec.model_type == _BPE and not changes

    @property
    def is_like_gemma(self) -> bool:
        return self.is_plain_bpe and "bos" in self.special_pieces


def _no_model(file: Path, content: bytes) -> str:
    said = f"{file} ({len(content):,} bytes) is no SentencePiece model"
    if content.startswith(_LARGE_FILE_POINTER):
        return f"{said} but a pointer of Git LFS to one; fetch the file itself (git lfs pull)"
    return f"{said}, or is damaged; fetch it anew, or give a folder with tokenizer.json"
