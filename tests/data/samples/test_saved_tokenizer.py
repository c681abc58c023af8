"""Folders of every kind give the tokens that open_clip gives, which reads them by transformers."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer
from transformers import AutoTokenizer

from parallel_clip.data.samples.saved_tokenizer import find_tokenizer
from parallel_clip.data.samples.tokenizer import FolderTokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from tests.data.samples.odd_captions import ODD, random_captions
from tests.data.samples.sentencepiece_models import gemma_like, mt5_like, sentences, t5_like
from tests.data.samples.tokenizer_folders import make_bert, make_folder, make_unigram

# Transformers says it of captions that end in </s>.
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has")

T5, MT5, GEMMA = (
    {"spiece.model": t5_like},
    {"spiece.model": mt5_like},
    {"tokenizer.model": gemma_like},
)
SIGLIP2 = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}


def folder_of(
    models: dict[str, Callable[[], bytes]],
    class_: str | None,
    model_type: str | None = None,
    **settings: Any,
) -> Callable[[Path], Path]:
    """Makes a folder with a SentencePiece model alone."""

    def make(folder: Path) -> Path:
        files = {name: train() for name, train in models.items()}
        described = settings | ({"tokenizer_class": class_} if class_ else {})
        return make_folder(folder, files, described or None, model_type)

    return make


def saved(make: Callable[[Path], Path], edit: Callable[[Path], None] = lambda folder: None):
    """Makes what transformers writes of a folder."""

    def make_saved(folder: Path) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(make(folder.with_name("source")))
        tokenizer.save_pretrained(folder)
        edit(folder)
        return folder

    return make_saved


def no_first_space(folder: Path) -> None:
    """As transformers 4.57 writes T5's, whose own reader takes it so."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": True
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def as_siglip2(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "siglip2"}')


def with_another_tokenizer_json(folder: Path) -> None:
    make_unigram(folder.with_name("other")).joinpath("tokenizer.json").rename(
        folder / "tokenizer.json"
    )


def bert(folder: Path) -> Path:
    make_bert(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')
    return folder


siglip_t5 = partial(folder_of, T5, "T5Tokenizer", extra_ids=0, pad_token="</s>")
siglip2_gemma = folder_of(GEMMA, "GemmaTokenizer", **SIGLIP2)

FOLDERS = {
    "SigLIP": folder_of(T5, "SiglipTokenizer"),
    "SigLIP, saved": saved(folder_of(T5, "SiglipTokenizer")),
    "SigLIP, told by its model": folder_of(T5, None, "siglip"),
    "SigLIP with capitals": folder_of(T5, "SiglipTokenizer", do_lower_case=False),
    "SigLIP, multilingual": folder_of(MT5, "SiglipTokenizer"),
    "SigLIP, padded otherwise": folder_of(T5, "SiglipTokenizer", pad_token="<pad>"),
    "SigLIP's class with another model": folder_of(
        {"spiece.model": gemma_like}, "SiglipTokenizer", eos_token="<eos>", pad_token="<eos>"
    ),
    "SigLIP beside tokenizer.json": saved(
        folder_of(T5, "SiglipTokenizer"), with_another_tokenizer_json
    ),
    "SigLIP of OpenCLIP": saved(siglip_t5()),
    "SigLIP of OpenCLIP by transformers 4": saved(siglip_t5(), no_first_space),
    "SigLIP of OpenCLIP, multilingual": saved(folder_of(MT5, "T5TokenizerFast", extra_ids=0)),
    "T5": folder_of(T5, "T5Tokenizer"),
    "T5, told by its model": folder_of(T5, None, "t5"),
    "T5 cut at the left": folder_of(T5, "T5Tokenizer", truncation_side="left"),
    "T5, saved": saved(folder_of(T5, "T5Tokenizer")),
    "mT5": folder_of(MT5, "T5Tokenizer", "mt5", extra_ids=0),
    "SigLIP 2": siglip2_gemma,
    "SigLIP 2, saved": saved(siglip2_gemma),
    "SigLIP 2 of NaFlex": saved(siglip2_gemma, as_siglip2),
    "SigLIP 2 by its class": folder_of(GEMMA, "Siglip2Tokenizer", **SIGLIP2),
    "Gemma": folder_of(GEMMA, "GemmaTokenizer"),
    "Gemma with both ends": folder_of(
        GEMMA, "GemmaTokenizerFast", add_bos_token=True, add_eos_token=True, truncation_side="left"
    ),
    "Gemma, saved": saved(folder_of(GEMMA, "GemmaTokenizer")),
    "BERT": bert,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def check_equal(folder: Path, captions: list[str], clean: str) -> None:
    found = find_tokenizer(folder)
    if found.kind == "Siglip2Tokenizer" and found.is_sentencepiece:  # see GemmaTokenizer
        captions = [caption for caption in captions if "<H1>" not in caption]
    theirs = HFTokenizer(str(folder), context_length=64, clean=clean)(captions)
    ours = FolderTokenizer(folder, 64, clean)(captions)
    differing = (ours != theirs).any(1).nonzero().flatten().tolist()
    assert not differing, f"{len(differing)} of {len(captions)}: {captions[differing[0]]!r}"
    assert len(torch.unique(ours, dim=0)) > len(captions) // 2


def odd_captions(count: int) -> list[str]:
    return ODD + random_captions(count // 2, seed=2) + sentences(count // 2, seed=2)


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens_equal_open_clips(tmp_path, kind, clean):
    check_equal(FOLDERS[kind](tmp_path / "made"), odd_captions(100), clean)


SPELLED = st.sampled_from(
    ["</s>", "<unk>", "<pad>", "<eos>", "<h1>", "\u2581", "\u0301", " ", "photo"]
)
ANY_TEXT = st.lists(st.one_of(SPELLED, st.characters(exclude_categories=["Cs"])), max_size=30)


@pytest.mark.parametrize("kind", ["SigLIP", "mT5", "Gemma", "SigLIP 2 by its class"])
def test_tokens_of_any_text_equal_open_clips(tmp_path, kind):
    folder = FOLDERS[kind](tmp_path / "made")
    theirs = HFTokenizer(str(folder), context_length=16, clean="whitespace")
    ours = FolderTokenizer(folder, 16)

    @settings(max_examples=80)
    @given(st.lists(ANY_TEXT.map("".join), min_size=1, max_size=4))
    def check(texts):
        assert torch.equal(ours(texts), theirs(texts))

    check()


@pytest.mark.long
@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens_of_10_000_captions_equal_open_clips(tmp_path, kind, clean):
    check_equal(FOLDERS[kind](tmp_path / "made"), odd_captions(10_000), clean)


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
@pytest.mark.parametrize("folder", os.environ.get("PARALLEL_CLIP_TOKENIZERS", "").split(":"))
def test_tokens_of_your_folders_equal_open_clips(tmp_path, folder, clean):
    """PARALLEL_CLIP_TOKENIZERS names folders or SentencePiece models, with ":" between them."""
    if not folder:
        pytest.skip("PARALLEL_CLIP_TOKENIZERS names no folder")
    if find_tokenizer(Path(folder)).is_assumed:
        files = TokenizerFiles.read(Path(folder)).for_transformers()
        folder = make_folder(tmp_path / "described", files)
    check_equal(Path(folder), odd_captions(10_000), clean)


@pytest.mark.parametrize(
    "files, settings, model_type, kind, file",
    [
        (["spiece.model"], {}, None, "SiglipTokenizer", "spiece.model"),
        (["tokenizer.model"], {}, None, "SiglipTokenizer", "tokenizer.model"),
        (["tokenizer.json", "spiece.model"], {}, "siglip", "SiglipTokenizer", "spiece.model"),
        (["tokenizer.json", "spiece.model"], {}, "t5", "T5Tokenizer", "tokenizer.json"),
        (["tokenizer.json", "spiece.model"], {}, None, None, "tokenizer.json"),
        (["tokenizer.json"], {"tokenizer_class": "SiglipTokenizer"}, None, "SiglipTokenizer",
         "tokenizer.json"),
        (["vocab.txt"], {"tokenizer_class": "BertTokenizerFast"}, "align", "BertTokenizer",
         "vocab.txt"),
        (["tokenizer.json"], {"tokenizer_class": "GemmaTokenizerFast"}, "siglip2",
         "Siglip2Tokenizer", "tokenizer.json"),
        (["tokenizer.json"], {"tokenizer_class": "GemmaTokenizerFast"}, "siglip",
         "GemmaTokenizer", "tokenizer.json"),
    ],
)  # fmt: skip
def test_which_file_and_class(tmp_path, files, settings, model_type, kind, file):
    made = make_folder(tmp_path / "made", dict.fromkeys(files, t5_like()), settings, model_type)
    found = find_tokenizer(made)
    assert (found.kind, found.file) == (kind, made / file)


@pytest.mark.parametrize("list_tokens", [False, True])
def test_the_settings_file_that_lists_the_tokens_has_the_last_word(tmp_path, list_tokens):
    config = {"pad_token": "a"} | ({"added_tokens_decoder": {}} if list_tokens else {})
    made = make_folder(tmp_path / "made", {"tokenizer.json": b"{}"}, config)
    (made / "special_tokens_map.json").write_text('{"pad_token": {"content": "b"}}')
    assert find_tokenizer(made).special_token("pad") == ("a" if list_tokens else "b")


@pytest.mark.parametrize(
    "files, class_, message",
    [
        ({}, None, "has none of tokenizer.json, vocab.txt, spiece.model and tokenizer.model"),
        (T5, "XLMRobertaTokenizer",
         r"is a XLMRobertaTokenizer, .* not read from spiece.model alone .*save_pretrained"),
    ],
)  # fmt: skip
def test_folders_without_a_tokenizer_that_is_read(tmp_path, files, class_, message):
    with pytest.raises(InputError, match=message):
        find_tokenizer(folder_of(files, class_)(tmp_path / "made"))


def test_a_class_that_is_no_text_is_named(tmp_path):
    made = make_folder(tmp_path / "made", {"tokenizer_config.json": b'"abc"', "vocab.txt": b""})
    with pytest.raises(InputError, match="tokenizer_config.json cannot be read"):
        find_tokenizer(made)
