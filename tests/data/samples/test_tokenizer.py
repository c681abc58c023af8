import gzip
import pickle
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
from tests.data.samples.odd_captions import ODD, random_captions
from tests.data.samples.sentencepiece_models import mt5_like, t5_like
from tests.data.samples.tokenizer_folders import (
    VOCABULARY,
    make_bert,
    make_folder,
    make_spiece,
    make_unigram,
)

OURS = ClipTokenizer(77)
THEIRS = open_clip.get_tokenizer("ViT-B-32")


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
    plain.add_special_tokens(["<pad>"])  # as transformers takes what the settings name
    expected = [plain.encode(caption).ids for caption in cleaned]
    rows = FolderTokenizer(unigram, 12, clean)(captions).tolist()
    assert rows == [ids + [0] * (12 - len(ids)) for ids in expected]


def test_the_choice_of_a_tokenizer(bert, unigram):
    named = Text(tokenizer="some/bert", tokenizer_kwargs={"strip_sep_token": True})
    assert build_tokenizer(None, Text(), None).path is None
    assert build_tokenizer(None, Text(), bert).path is None
    assert build_tokenizer("openclip", Text(tokenizer="some/bert"), bert).path is None
    assert build_tokenizer(str(unigram), named, bert).path == unigram
    beside = build_tokenizer(None, named, bert)
    assert beside.path == bert and beside.context_length == 16
    assert not (beside(["a"]) == 3).any()


def test_a_tokenizer_that_is_not_at_hand(tmp_path):
    with pytest.raises(InputError, match="hf download some/bert .*data.tokenizer=FOLDER"):
        build_tokenizer(None, Text(tokenizer="some/bert"), tmp_path)


def test_the_choice_of_a_sentencepiece_model(tmp_path):
    (tmp_path / "any.model").write_bytes(t5_like())
    text = Text(tokenizer="timm/SigLIP", tokenizer_kwargs={"clean": "canonicalize"})
    named = build_tokenizer(str(tmp_path / "any.model"), text, None)
    beside = build_tokenizer(None, text, make_spiece(tmp_path / "beside"))
    assert named.path == tmp_path / "any.model" and beside.path == tmp_path / "beside"
    assert torch.equal(named(ODD), beside(ODD))
    assert torch.equal(named(["A photo!"]), named(["a  photo"]))


@pytest.mark.parametrize("class_, model, extra", [
    ("SiglipTokenizer", mt5_like, {}),
    ("T5Tokenizer", mt5_like, {"extra_ids": 0}),
    ("T5Tokenizer", t5_like, {}),
])  # fmt: skip
def test_sentinels_above_the_vocabulary_are_unknown(tmp_path, class_, model, extra):
    """mT5's file has 100 sentinels more than SigLIP's multilingual models have tokens."""
    settings = {"tokenizer_class": class_} | extra
    folder = make_folder(tmp_path / "made", {"spiece.model": model()}, settings)
    size = 800 if model is t5_like else 1101
    whole = FolderTokenizer(folder, 16)
    cut = build_tokenizer(str(folder), Text(vocab_size=size), None)
    captions = [*ODD, "a <extra_id_0> b", "\u2581<extra_id_3>"]
    expected = whole(captions)
    assert whole.vocab_size > size == cut.vocab_size
    assert class_ == "SiglipTokenizer" or (expected >= size).any()
    assert torch.equal(cut(captions), expected.masked_fill(expected >= size, 2))
    with pytest.raises(
        InputError, match=f"has {whole.vocab_size:,} tokens.*vocabulary {size - 1:,}"
    ):
        build_tokenizer(str(folder), Text(vocab_size=size - 1), None)


@pytest.mark.parametrize(
    "choice, text, message",
    [
        ("openclip", Text(vocab_size=1000), "openclip has 49,408 tokens.*vocabulary 1,000"),
        ("bert", Text(vocab_size=10), "bert has 59 tokens"),
        ("nowhere", Text(), "data.tokenizer: nowhere does not exist"),
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
