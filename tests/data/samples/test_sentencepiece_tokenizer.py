"""SentencePiece models that nothing describes, and what is wrong with others."""

import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from open_clip.tokenizer import get_clean_fn
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from parallel_clip.data.samples.tokenizer import FolderTokenizer
from parallel_clip.errors import InputError
from tests.data.samples.odd_captions import ODD, random_captions
from tests.data.samples.sentencepiece_models import (
    gemma_like,
    mt5_like,
    piece_count,
    sentences,
    t5_like,
)
from tests.data.samples.tokenizer_folders import make_folder, make_gemma, make_spiece

CAPTIONS = ODD + random_captions(200, seed=3) + sentences(200, seed=3)


@pytest.mark.parametrize("model, pad", [(t5_like, 1), (mt5_like, 1), (gemma_like, 0)])
def test_tokens_are_sentencepieces_an_end_and_padding(tmp_path, model, pad):
    """What SigLIP and SigLIP 2 were trained with: ends are 1, SigLIP pads with them."""
    (tmp_path / "any name.model").write_bytes(model())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model())
    # Transformers finds Gemma's symbols of several spaces before a space beside them becomes one.
    captions = [caption for caption in CAPTIONS if "\u2581\u2581" not in caption]
    cleaned = map(get_clean_fn("canonicalize"), captions)
    expected = [[*pieces.encode(text)[:63], 1] for text in cleaned]
    tokens = FolderTokenizer(tmp_path / "any name.model", 64, "canonicalize")(captions)
    assert tokens.tolist() == [row + [pad] * (64 - len(row)) for row in expected]
    assert tokens.dtype == torch.int64 and FolderTokenizer(tmp_path / "any name.model", 8)(
        []
    ).shape == (0, 8)


def test_what_is_assumed_of_a_model_is_said(tmp_path):
    spiece, gemma = make_spiece(tmp_path / "spiece"), make_gemma(tmp_path / "gemma")
    (said,) = FolderTokenizer(spiece, 8).notes
    assert said == (
        f"tokenizer: {spiece}/spiece.model is read as SiglipTokenizer: lower case, no punctuation, "
        "padded with </s>"
    )
    assert (
        "GemmaTokenizer: the text as it is, padded with <pad>" in FolderTokenizer(gemma, 8).notes[0]
    )
    described = make_folder(spiece, {}, {"tokenizer_class": "SiglipTokenizer"})
    assert FolderTokenizer(described, 8).notes == ()


def test_settings_overrule_what_is_assumed(tmp_path):
    made = make_folder(make_spiece(tmp_path / "made"), {}, {"pad_token": "<pad>"})
    assert FolderTokenizer(made, 8)(["a"])[0, -1] == 0


def both_kinds(tmp_path: Path) -> list[FolderTokenizer]:
    spiece, gemma = make_spiece(tmp_path / "spiece"), make_gemma(tmp_path / "gemma")
    t5 = make_folder(
        tmp_path / "t5", {"spiece.model": t5_like()}, {"tokenizer_class": "T5Tokenizer"}
    )
    return [FolderTokenizer(folder, 16) for folder in (spiece, gemma, t5)]


def test_tokenizers_can_be_sent_to_other_processes(tmp_path):
    for tokenizer in both_kinds(tmp_path):
        sent = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(sent(CAPTIONS[:50]), tokenizer(CAPTIONS[:50]))


def test_a_process_that_forks_has_started_no_thread(tmp_path):
    def tell(tokenizer, pipe):
        pipe.send(tokenizer(CAPTIONS[:50]).tolist())

    torch.full((64, 64), 1)
    before = len(os.listdir("/proc/self/task"))
    for tokenizer in both_kinds(tmp_path):
        expected = tokenizer(CAPTIONS[:50]).tolist()
        assert len(os.listdir("/proc/self/task")) == before
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=tell, args=(tokenizer, theirs))
        child.start()
        assert ours.poll(60) and ours.recv() == expected
        child.join()


@pytest.mark.parametrize("module", ["sentencepiece", "sentencepiece.sentencepiece_model_pb2"])
def test_libraries_that_are_missing_are_named(tmp_path, monkeypatch, module):
    made = make_spiece(tmp_path / "made")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    with pytest.raises(InputError, match=r'pip install "parallel_clip\[sentencepiece\]"'):
        FolderTokenizer(made, 8)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 798330\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"\(0 bytes\) is no SentencePiece model, or is damaged; fetch it anew"),
        (t5_like()[:100_000], r"\(100,000 bytes\) is no SentencePiece model, or is damaged"),
        (b"IQ== 0\nIg== 1\n", "is no SentencePiece model"),  # of tiktoken, under the same name
        (POINTER, "but a pointer of Git LFS .*git lfs pull"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(InputError, match=message):
            FolderTokenizer(path, 8)


def without_end() -> bytes:
    model = ModelProto.FromString(t5_like())
    model.trainer_spec.eos_id = -1
    model.pieces[1].piece = "<none>"
    return model.SerializeToString()


def described(class_: str, **settings: object) -> dict[str, object]:
    return {"tokenizer_class": class_} | settings


@pytest.mark.parametrize(
    "model, settings, message",
    [
        (without_end(), None, "spiece.model has no eos token </s> among its 800 pieces; .*config"),
        (without_end(), described("T5Tokenizer"), "no eos token </s> among its 900 pieces"),
        (t5_like(), described("SiglipTokenizer", pad_token="[PAD]"),
         r'no pad token \(\[PAD\]\) among its 800; name one .* as "pad_token" in .*config.json'),
        (t5_like(), described("SiglipTokenizer", eos_token="<eos>"), "no eos token <eos> among"),
        (t5_like(), described("GemmaTokenizer"),
         "names GemmaTokenizer, but spiece.model is not a byte-pair model"),
        (gemma_like(), described("GemmaTokenizer", add_eos_token=True, eos_token="</s>"),
         "no eos token </s> among its 1,200 pieces"),
        (t5_like(), described("SiglipTokenizer", additional_special_tokens=["<a>", "<b>", "<unk>"]),
         r"adds 2 tokens to the 800 pieces of spiece.model \(<a>, <b>\); .*save_pretrained"),
    ],
)  # fmt: skip
def test_models_that_lack_what_is_needed(tmp_path, model, settings, message):
    made = make_folder(tmp_path / "made", {"spiece.model": model}, settings)
    with pytest.raises(InputError, match=message):
        FolderTokenizer(made, 8)


def test_a_file_alone_is_told_where_settings_go(tmp_path):
    (tmp_path / "x.model").write_bytes(without_end())
    with pytest.raises(InputError, match="tokenizer_config.json beside it, and give the folder"):
        FolderTokenizer(tmp_path / "x.model", 8)


def test_pieces_are_counted():
    assert [piece_count(model()) for model in (t5_like, mt5_like, gemma_like)] == [800, 1106, 1200]
