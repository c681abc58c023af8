"""Tokenizers of Hugging Face folders: tokens equal to transformers', in both directions."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from parallel_clip.convert.huggingface_tokenizer import (
    find_tokenizer,
    tokenizer_files_to_write,
    with_cleaning,
)
from parallel_clip.data.samples.tokenizer import build_tokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json
from tests.data.samples.tokenizer_folders import make_bert, make_unigram
from tests.small_models import small_model

TEXTS = [
    "A photo of a DOG.", "it's  two\n dogs, isn't it?", "snake_case & 1234", "", "dog " * 30,
    "caf\u00e9 \u72ac", "  !?  ",
]  # fmt: skip


def text_config(**text):
    text = {"vocab_size": 49408, "context_length": 16} | text
    return architecture_from_json(small_model(text=text), "small").text


def write(folder, tokenizer, text, siglip=False):
    folder.mkdir()
    for name, content in tokenizer_files_to_write(tokenizer, text, siglip=siglip).items():
        (folder / name).write_bytes(content)
    return folder


def theirs(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")


def test_clips_own_is_written_and_known_again(tmp_path):
    text = text_config()
    folder = write(tmp_path / "clip", TokenizerFiles(), text)
    assert find_tokenizer(folder, siglip=False) == ("openclip", {}, None)
    found = theirs(folder, TEXTS)
    ours = build_tokenizer("openclip", text, None)(TEXTS)
    # Theirs pads with the end of the text, at whose first place the feature is taken.
    for row, mask, expected in zip(found["input_ids"], found["attention_mask"], ours, strict=True):
        tokens = int(mask.sum())
        assert torch.equal(row[:tokens], expected[:tokens]) and not expected[tokens:].any()
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert find_tokenizer(tmp_path / "again", siglip=False).choice == "openclip"


def test_a_folder_without_one_means_clips_own_and_says_so(tmp_path):
    found = find_tokenizer(tmp_path, siglip=False)
    assert found.choice == "openclip" and "holds no tokenizer" in found.note
    assert find_tokenizer(tmp_path, siglip=True).choice == str(tmp_path)


def test_a_vocabulary_of_another_model_writes_no_tokenizer(tmp_path):
    assert (
        tokenizer_files_to_write(TokenizerFiles(), text_config(vocab_size=101), siglip=False) == {}
    )


@pytest.mark.parametrize("clean", [None, "lower", "canonicalize"])
@pytest.mark.parametrize("siglip", [False, True])
def test_a_cleaning_of_texts_is_the_tokenizers_own(tmp_path, clean, siglip):
    """open_clip cleans texts before its tokenizer sees them, transformers does not."""
    kwargs = {"tokenizer_kwargs": {"clean": clean}} if clean else {}
    text = text_config(hf_tokenizer_name="a/name", vocab_size=200, **kwargs)
    make_unigram(tmp_path / "files")
    files = TokenizerFiles.read(tmp_path / "files", "a/name")
    folder = write(tmp_path / "hf", files, text, siglip)
    texts = TEXTS if clean else ["A photo of a DOG.", "dog " * 30]
    found = theirs(folder, texts)
    assert torch.equal(
        found["input_ids"], build_tokenizer(str(tmp_path / "files"), text, None)(texts)
    )
    assert ("attention_mask" in found) != siglip  # SigLIP works on its padding
    choice, text_cfg, _ = find_tokenizer(folder, siglip=siglip)
    assert choice == str(folder) and text_cfg == {"hf_tokenizer_name": "a/name", **kwargs}
    assert torch.equal(build_tokenizer(choice, text, None)(texts), found["input_ids"])
    again = write(tmp_path / "again", TokenizerFiles.read(folder, "a/name"), text, siglip)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_vocabulary_of_berts_travels(tmp_path):
    make_bert(tmp_path / "files")
    text = text_config(hf_tokenizer_name="bert", vocab_size=200)
    folder = write(tmp_path / "hf", TokenizerFiles.read(tmp_path / "files", "bert"), text)
    texts = ["A Photo of a dog", "photo dog"]
    expected = build_tokenizer(str(tmp_path / "files"), text, None)(texts)
    assert torch.equal(theirs(folder, texts)["input_ids"], expected)


@pytest.mark.parametrize(
    "tokenizer_class, clean",
    [
        ("SiglipTokenizer", "canonicalize"),
        ("SiglipTokenizerFast", "canonicalize"),
        ("Siglip2Tokenizer", "lower"),
        ("T5Tokenizer", None),
        (None, None),
    ],
)
def test_a_class_that_cleans_texts_is_known(tmp_path, tokenizer_class, clean):
    make_unigram(tmp_path / "name")
    settings = {"tokenizer_class": tokenizer_class, "pad_token": "<pad>"}
    (tmp_path / "name/tokenizer_config.json").write_text(json.dumps(settings))
    expected = {"tokenizer_kwargs": {"clean": clean}} if clean else {}
    found = find_tokenizer(tmp_path / "name", siglip=True)
    assert found.text_cfg == {"hf_tokenizer_name": "name"} | expected
    assert found.choice == str(tmp_path / "name")


def test_cleaning_twice_is_cleaning_once(tmp_path):
    content = (make_unigram(tmp_path / "files") / "tokenizer.json").read_bytes()
    once = with_cleaning(content, "canonicalize")
    assert once != content and with_cleaning(once, "canonicalize") == once
    bare = json.loads(content) | {"normalizer": None}
    assert json.loads(with_cleaning(json.dumps(bare).encode(), "lower"))["normalizer"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_file_is_named(tmp_path, name, content):
    make_unigram(tmp_path / "files")
    (tmp_path / "files" / name).write_text(content)
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        find_tokenizer(tmp_path / "files", siglip=True)
