import gzip
import pickle
import random
import string
from dataclasses import dataclass, field
from typing import Any

import open_clip
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe, get_clean_fn

from parallel_clip.data.samples.tokenizer import ClipTokenizer, FolderTokenizer, build_tokenizer
from parallel_clip.errors import InputError
from tests.data.samples.tokenizer_folders import VOCABULARY, make_bert, make_unigram

OURS = ClipTokenizer(77)
THEIRS = open_clip.get_tokenizer("ViT-B-32")

ODD = [
    "",
    " ",
    "a photo of a dog",
    "DON'T we'll I'm they'RE you'Ve he'd it's 'S",
    "caf\u00e9 cafe\u0301 na\u00efve \u0130stanbul stra\u00dfe \u017fhort K",
    "\u72ac\u304c\u8d70\u308b \ud55c\uad6d\uc5b4 \u0e20\u0e32 \u0645\u0631\u062d \u05e9\u05dc",
    "\U0001f436\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "tabs\tand\nlines\r\nand\x0b\x0c\x1c\x85\u2028\u3000spaces",
    "control\x00\x01\x07\x1b[31mred\x7f\ufeff",
    "&lt;b&gt; &amp;amp; &amp;lt;i&amp;gt; &#128054; &#xD800; &nbsp;x &copy",
    "cr\u00c3\u00a8me br\u00c3\u00bbl\u00c3\u00a9e \u00e2\u20ac\u0153quotes\u00e2\u20ac\u009d",
    "<start_of_text> <END_of_text><|endoftext|> <end_of_text>x",
    "1234567890 \u0661\u0662\u0663 \u00bd \u2167 3.14e-10",
    "https://example.com/a_b?c=d&e=f#g",
    "!!!???...---___\u2014\u2026\u201c\u201d",
    "lone \ud800 surrogate",
    "x" * 3000,
    "word " * 500,
    "\U0001f600" * 200,
    "\u0000",
]


def random_captions(count: int) -> list[str]:
    generator = random.Random(0)
    pieces = [
        *string.printable,
        *"\u00e9\u00fc\u00df\u0131\u017f\u212a\u0434\u72ac\u304c\ud55c\u0e20\u0645\u05e9\U0001f436\u200d\ufe0f\u00a0\u2028\x85\x1c\u0301",
        *["the ", "photo", " dog", "'s", "&amp;", "&#39;", "\u00c3\u00a9", "<end_of_text>", "123"],
        *[chr(generator.randrange(0xA0, 0xD000)) for _ in range(300)],
        *[chr(generator.randrange(0x10000, 0x20000)) for _ in range(100)],
    ]
    return ["".join(generator.choices(pieces, k=generator.randrange(60))) for _ in range(count)]


def test_clip_tokens_equal_openclips():
    captions = ODD + random_captions(10_000)
    assert torch.equal(OURS(captions), THEIRS(captions))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_clip_tokens_equal_openclips_on_any_text(text):
    assert torch.equal(OURS([text]), THEIRS([text]))


def test_clip_tokens_of_every_merge():
    """Each token of the vocabulary, as text, is split alike."""
    tokens = gzip.open(default_bpe()).read().decode().split("\n")[1:48895:7]
    words = [THEIRS.decode([THEIRS.encoder["".join(token.split())]]) for token in tokens]
    assert [OURS.encode(word) for word in words] == [THEIRS.encode(word) for word in words]


@pytest.mark.parametrize("context_length", [2, 3, 8, 32, 64, 256])
def test_clip_tokens_at_any_length(context_length):
    result = ClipTokenizer(context_length)(ODD)
    assert torch.equal(result, THEIRS(ODD, context_length=context_length))
    assert result.dtype == torch.int64 and result.shape == (len(ODD), context_length)
    assert (result == 49407).any(1).all()


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_clip_tokens_with_every_cleaning(clean):
    captions = ODD + random_captions(200)
    ours, theirs = ClipTokenizer(40, clean), SimpleTokenizer(context_length=40, clean=clean)
    assert torch.equal(ours(captions), theirs(captions))


def test_no_captions_are_no_tokens():
    assert OURS([]).shape == (0, 77)


@dataclass
class Text:
    context_length: int = 16
    vocab_size: int = 49408
    tokenizer: str | None = None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def bert(tmp_path):
    return make_bert(tmp_path / "bert")


@pytest.fixture
def unigram(tmp_path):
    return make_unigram(tmp_path / "unigram")


def test_a_folder_with_a_bert_vocabulary(bert):
    tokens = FolderTokenizer(bert, 8)(["A Photo\n of a d\u00f6g &amp; cat", "\u72ac", ""])
    known = {token: number for number, token in enumerate(VOCABULARY)}

    def row(*words: str) -> list[int]:
        return [known[w] for w in words] + [0] * (8 - len(words))

    assert tokens.tolist() == [
        row("[CLS]", "a", "photo", "o", "##f", "a", "dog", "[SEP]"),
        row("[CLS]", "\u72ac", "[SEP]"),
        row("[CLS]", "[SEP]"),
    ]


def test_the_separator_is_stripped_on_request(bert):
    plain, stripped = FolderTokenizer(bert, 6), FolderTokenizer(bert, 6, strip_sep_token=True)
    captions = ["a dog", "a b c d e f g"]
    assert (plain(captions) == 3).any(1).all()
    assert torch.equal(stripped(captions), plain(captions).masked_fill(plain(captions) == 3, 0))


def test_a_folder_with_tokenizer_json(unigram):
    tokens = FolderTokenizer(unigram, 6)(["dog photo", "dog photo photo photo dog", ""])
    assert tokens.shape == (3, 6) and tokens[:, -1].tolist() == [0, 1, 0]
    assert [row.count(1) for row in tokens.tolist()] == [1, 1, 1]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_cleaning_before_a_folders_tokenizer(unigram, clean):
    captions = ODD + random_captions(100)
    cleaned = [get_clean_fn(clean)(caption) for caption in captions]
    plain = tokenizers.Tokenizer.from_file(str(unigram / "tokenizer.json"))
    plain.enable_truncation(12)
    expected = [plain.encode(caption).ids for caption in cleaned]
    rows = FolderTokenizer(unigram, 12, clean)(captions).tolist()
    assert rows == [ids + [0] * (12 - len(ids)) for ids in expected]


def test_the_choice_of_a_tokenizer(bert, unigram):
    named = Text(tokenizer="some/bert", tokenizer_kwargs={"strip_sep_token": True})
    assert build_tokenizer(None, Text(), None).folder is None
    assert build_tokenizer(None, Text(), bert).folder is None
    assert build_tokenizer("openclip", Text(tokenizer="some/bert"), bert).folder is None
    assert build_tokenizer(str(unigram), named, bert).folder == unigram
    beside = build_tokenizer(None, named, bert)
    assert beside.folder == bert and beside.context_length == 16
    assert not (beside(["a"]) == 3).any()


def test_a_tokenizer_that_is_not_at_hand(tmp_path):
    with pytest.raises(InputError, match="hf download some/bert .*data.tokenizer=FOLDER"):
        build_tokenizer(None, Text(tokenizer="some/bert"), tmp_path)


@pytest.mark.parametrize(
    "choice, text, message",
    [
        ("openclip", Text(vocab_size=1000), "openclip has 49,408 tokens.*vocabulary 1,000"),
        ("bert", Text(vocab_size=10), "bert has 59 tokens"),
        ("nowhere", Text(), "nowhere has neither tokenizer.json nor vocab.txt"),
        (None, Text(tokenizer_kwargs={"reduction_mask": "simple"}), "reduction_mask .* not supp"),
        (None, Text(tokenizer_kwargs={"clean": "upper"}), "'upper': expected one of lower"),
        ("bert", Text(tokenizer="x", tokenizer_kwargs={"language": "de"}), "language .* not supp"),
    ],
)
def test_choices_that_cannot_be(bert, monkeypatch, choice, text, message):
    monkeypatch.chdir(bert.parent)
    with pytest.raises(InputError, match=message):
        build_tokenizer(choice, text, None)


@pytest.mark.parametrize(
    "name, contents, message",
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer_config.json", "[1", "cannot be read"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "no pad token"),
    ],
)
def test_damaged_folders(unigram, name, contents, message):
    (unigram / name).write_text(contents)
    with pytest.raises(InputError, match=message):
        FolderTokenizer(unigram, 8)


def test_tokenizers_can_be_sent_to_other_processes(bert):
    for tokenizer in (OURS, FolderTokenizer(bert, 8)):
        sent = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(sent(["a dog", "a photo"]), tokenizer(["a dog", "a photo"]))
