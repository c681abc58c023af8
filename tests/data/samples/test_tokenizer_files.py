"""A tokenizer's files, taken from its folder and put elsewhere, give the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer

from parallel_clip.data.samples.tokenizer import FolderTokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from tests.data.samples.odd_captions import ODD
from tests.data.samples.sentencepiece_models import gemma_like, mt5_like, sentences, t5_like
from tests.data.samples.tokenizer_folders import (
    make_bert,
    make_folder,
    make_gemma,
    make_spiece,
    make_unigram,
)

# Transformers says it of captions that end in </s>.
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has")

# Of SigLIP 2's class that symbol is left out: see GemmaTokenizer.
CAPTIONS = [text for text in ODD if "<H1>" not in text] + sentences(100, seed=4)


def file_alone(folder: Path) -> Path:
    return make_folder(folder, {"cc_en.model": mt5_like()}) / "cc_en.model"


def gemma_file_alone(folder: Path) -> Path:
    return make_folder(folder, {"gemma_tokenizer.model": gemma_like()}) / "gemma_tokenizer.model"


def under_the_other_name(folder: Path) -> Path:
    return make_folder(folder, {"tokenizer.model": t5_like()})


def told_by_the_model(folder: Path) -> Path:
    return make_folder(folder, {"spiece.model": t5_like()}, model_type="siglip")


def t5_told_by_the_model(folder: Path) -> Path:
    return make_folder(folder, {"spiece.model": mt5_like()}, {"extra_ids": 0}, model_type="mt5")


def siglip2_told_by_the_model(folder: Path) -> Path:
    gemma = {"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}
    return make_folder(folder, {"tokenizer.model": gemma_like()}, gemma, model_type="siglip2")


def siglip_with_tokenizer_json(folder: Path) -> Path:
    make_unigram(folder)
    return make_folder(folder, {}, {"tokenizer_class": "SiglipTokenizer"})


MAKERS = [make_bert, make_unigram, make_spiece, make_gemma, file_alone, gemma_file_alone,
          under_the_other_name, told_by_the_model, t5_told_by_the_model, siglip2_told_by_the_model,
          siglip_with_tokenizer_json]  # fmt: skip


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
@pytest.mark.parametrize("make", MAKERS)
def test_files_that_travel_give_the_same_tokens(tmp_path, monkeypatch, make, clean):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = make(tmp_path / "made")
    expected = FolderTokenizer(made, 32, clean)(CAPTIONS)
    kept = make_folder(tmp_path / "kept", dict(TokenizerFiles.read(made).files))
    assert torch.equal(FolderTokenizer(kept, 32, clean)(CAPTIONS), expected)
    written = make_folder(tmp_path / "written", TokenizerFiles.read(kept).for_transformers())
    assert torch.equal(FolderTokenizer(written, 32, clean)(CAPTIONS), expected)
    theirs = HFTokenizer(str(written), context_length=32, clean=clean)(CAPTIONS)
    assert torch.equal(theirs, expected)


def test_files_are_called_by_their_folder_or_file(tmp_path):
    assert TokenizerFiles.read(make_spiece(tmp_path / "folder")).name == "folder"
    assert TokenizerFiles.read(file_alone(tmp_path / "alone")).name == "cc_en"
    assert TokenizerFiles.read(tmp_path / "folder", "a/name").name == "a/name"


def test_files_that_say_all_are_kept_as_they_are(tmp_path):
    settings = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0}
    made = make_folder(tmp_path / "made", {"spiece.model": t5_like()}, settings)
    (made / "model.safetensors").write_bytes(b"weights")
    files = TokenizerFiles.read(made).files
    assert files == {f.name: f.read_bytes() for f in made.iterdir() if f.suffix != ".safetensors"}


def test_what_nothing_describes_is_described(tmp_path):
    files = TokenizerFiles.read(make_gemma(tmp_path / "made")).files
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
