"""SentencePiece models as SigLIP's (T5's options) and SigLIP 2's (Gemma's), trained here."""

import io
import random
from functools import lru_cache

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tests.data.samples.odd_captions import random_captions

_WORDS = (
    "a the of in on with and dog cat photo picture red green house street people small large "
    "running sitting tree water standing old young woman man two 1984 2 tokens model </s> s"
).split()
_T5 = {
    "model_type": "unigram",
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": True,
    "character_coverage": 0.98,
}
_GEMMA = {
    "model_type": "bpe",
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.98,
    "user_defined_symbols": [
        *["<mask>", "<unused0>", "<unused1>", "<start_of_turn>", "\n", "\n\n", "<h1>", "</h1>"],
        *["\u2581" * length for length in range(2, 6)],
    ],
}


@lru_cache
def t5_like() -> bytes:
    return _train(800, **_T5)


@lru_cache
def mt5_like() -> bytes:
    """With bytes for unknown characters, a symbol that normalizing would change, and T5's
    sentinels at the end."""
    model = ModelProto.FromString(_train(1100, byte_fallback=True, **_T5))
    model.pieces.add(piece="\u2460\u2460", type=4)
    for number in reversed(range(5)):
        model.pieces.add(piece=f"\u2581<extra_id_{number}>", type=4)
    return model.SerializeToString()


@lru_cache
def gemma_like() -> bytes:
    return _train(1200, **_GEMMA)


def piece_count(model: bytes) -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of words that the models have seen, some of which run into one another or into digits."""
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ["a", "e", "i", "or", "un"]]
    made_up = [
        "".join(generator.choices(syllables, k=generator.randrange(1, 5))) for _ in range(300)
    ]
    between = [*[" "] * 12, "", ", ", ".  ", "-", "_", "\u2581", "7"]
    joined = [
        [w + generator.choice(between) for w in generator.choices(_WORDS + made_up, k=10)]
        for _ in range(count)
    ]
    written = ["".join(words) for words in joined]
    return [text.title() if number % 7 == 0 else text for number, text in enumerate(written)]


def _train(pieces: int, **options: object) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400) + random_captions(300, seed=1)),
        model_writer=written,
        vocab_size=pieces,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return written.getvalue()
