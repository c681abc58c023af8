"""Tokenizers of Hugging Face folders: tokens equal to transformers', in both directions."""

import json
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer

from parallel_clip.convert.huggingface_tokenizer_files import (
    huggingface_tokenizer,
    tokenizer_of_folder,
    with_cleaning,
)
from parallel_clip.data.samples.tokenizer import build_tokenizer
from parallel_clip.data.samples.tokenizer_files import TokenizerFiles
from parallel_clip.errors import InputError
from parallel_clip.model.openclip_json import architecture_from_json
from tests.data.samples.sentencepiece_models import gemma_like, t5_like
from tests.data.samples.tokenizer_folders import make_bert, make_folder, make_unigram
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
    for name, content in huggingface_tokenizer(tokenizer, text, siglip=siglip).files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clips own") / "clip", TokenizerFiles(), text_config())


def theirs(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")


def test_clips_own_is_written_and_known_again(clip_folder, tmp_path):
    text, folder = text_config(), clip_folder
    assert tokenizer_of_folder(folder, siglip=False) == ("openclip", {}, ())
    found = theirs(folder, TEXTS)
    ours = build_tokenizer("openclip", text, None)(TEXTS)
    # Theirs pads with the end of the text, at whose first place the feature is taken.
    for row, mask, expected in zip(found["input_ids"], found["attention_mask"], ours, strict=True):
        tokens = int(mask.sum())
        assert torch.equal(row[:tokens], expected[:tokens]) and not expected[tokens:].any()
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert tokenizer_of_folder(tmp_path / "again", siglip=False).choice == "openclip"


def test_a_folder_without_one_means_clips_own_and_says_so(tmp_path):
    found = tokenizer_of_folder(tmp_path, siglip=False)
    assert found.choice == "openclip" and "holds no tokenizer" in found.notes[0]
    assert tokenizer_of_folder(tmp_path, siglip=True).choice == str(tmp_path)


def test_a_vocabulary_of_another_model_writes_no_tokenizer_and_says_so():
    written = huggingface_tokenizer(TokenizerFiles(), text_config(vocab_size=101), siglip=False)
    assert written.files == {}
    assert "the model has 101 tokens, CLIP's own tokenizer 49,408" in written.notes[0]


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "file, values",
    [
        ("added_tokens.json", {"<cat-toy>": 49408}),
        ("vocab.json", {"<|endoftext|>": 49408}),
        ("vocab.json", {"<cat-toy>": 49408}),
        # Tokens that transformers adds when it loads the folder.
        ("special_tokens_map.json", {"pad_token": "<pad>"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<cat-toy>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"49408": {"content": "<cat-toy>"}}}),
    ],
)
def test_clips_own_with_other_tokens_is_another(clip_folder, tmp_path, file, values):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit(folder / file, **values)
    found = tokenizer_of_folder(folder, siglip=False)
    assert (found.choice, found.text_cfg) == (str(folder), {"hf_tokenizer_name": "clip"})
    assert "vocab.json and other tokens than CLIP's, which are not read" in found.notes[0]


def test_tokens_that_were_added_to_clips_own_are_kept(clip_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(tmp_path / "clip")
    found = tokenizer_of_folder(tmp_path / "clip", siglip=False)
    texts = ["a photo of <cat-toy>", "a dog"]
    ours = build_tokenizer(found.choice, text_config(vocab_size=49409), None)(texts)
    expected = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    assert torch.equal(ours, expected["input_ids"]) and 49408 in ours


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_transformers_masks_is_told(tmp_path, side, masks):
    make_unigram(tmp_path / "files")
    more = {} if masks else {"model_input_names": ["input_ids"]}
    edit(tmp_path / "files/tokenizer_config.json", padding_side=side, **more)
    notes = tokenizer_of_folder(tmp_path / "files", siglip=False).notes
    assert ["transformers masks the padding" in note for note in notes] == [True] * (
        side == "left" and masks
    )
    text = text_config(hf_tokenizer_name="a/name")
    files = TokenizerFiles.read(tmp_path / "files", "a/name")
    notes = huggingface_tokenizer(files, text, siglip=False).notes
    assert ['padding="max_length"' in note for note in notes] == [True] * (side == "left")
    assert huggingface_tokenizer(files, text, siglip=True).notes == ()


def saved_gemma(folder):
    """What transformers writes of a folder with Gemma's SentencePiece model."""
    source = make_folder(folder.with_name("gemma"), {"tokenizer.model": gemma_like()}, GEMMA)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


GEMMA = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True}
FOLDERS = {
    "tokenizer.json": make_unigram,
    "vocab.txt": make_bert,
    "T5": partial(
        make_folder,
        files={"spiece.model": t5_like()},
        settings={"tokenizer_class": "T5Tokenizer", "extra_ids": 0},
    ),
    "SigLIP": partial(
        make_folder,
        files={"spiece.model": t5_like()},
        settings={"tokenizer_class": "SiglipTokenizer"},
    ),
    "Gemma": saved_gemma,
}


@pytest.mark.parametrize("clean", [None, "whitespace", "lower", "canonicalize"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_cleaning_of_texts_is_the_tokenizers_own(tmp_path, kind, clean):
    """open_clip cleans texts before its tokenizer sees them, of white space where nothing else is
    asked; transformers does not."""
    kwargs = {"tokenizer_kwargs": {"clean": clean}} if clean else {}
    text = text_config(hf_tokenizer_name="a/name", vocab_size=2000, **kwargs)
    FOLDERS[kind](tmp_path / "files")
    files = TokenizerFiles.read(tmp_path / "files", "a/name")
    siglip = kind == "SigLIP"
    folder = write(tmp_path / "hf", files, text, siglip)
    texts = TEXTS
    if siglip:  # whose class leaves "_" out, where open_clip's cleaning makes a space of it
        texts = [text.replace("_", "") for text in texts]
    if kind == "Gemma":  # whose symbol for it is taken out before anything is cleaned
        texts = [text.replace("\n", " ") for text in texts]
    found = theirs(folder, texts)
    expected = build_tokenizer(str(tmp_path / "files"), text, None)(texts)
    assert torch.equal(found["input_ids"], expected)
    assert "attention_mask" not in found  # OpenCLIP's towers work on padding
    choice, text_cfg, _ = tokenizer_of_folder(folder, siglip=siglip)
    assert choice == str(folder) and text_cfg == {"hf_tokenizer_name": "a/name", **kwargs}
    assert torch.equal(build_tokenizer(choice, text, None)(texts), expected)
    again = write(tmp_path / "again", TokenizerFiles.read(folder, "a/name"), text, siglip)
    assert torch.equal(theirs(again, texts)["input_ids"], expected)


def test_a_cleaning_that_cannot_be_said_to_transformers_is_told(tmp_path):
    make_folder(tmp_path / "files", {"tokenizer.model": gemma_like()}, GEMMA)
    files = TokenizerFiles.read(tmp_path / "files", "a/name")
    for kwargs, clean in (({"clean": "canonicalize"}, "canonicalize"), ({}, "whitespace")):
        text = text_config(hf_tokenizer_name="a/name", tokenizer_kwargs=kwargs)
        (note,) = huggingface_tokenizer(files, text, siglip=True).notes
        assert f"not cleaned by '{clean}' in transformers, as its GemmaTokenizer" in note


def test_a_tokenizer_of_others_is_called_by_its_folder(tmp_path):
    FOLDERS["SigLIP"](tmp_path / "name")
    found = tokenizer_of_folder(tmp_path / "name", siglip=True)
    assert found == (str(tmp_path / "name"), {"hf_tokenizer_name": "name"}, ())


def test_cleaning_twice_is_cleaning_once(tmp_path):
    content = (make_unigram(tmp_path / "files") / "tokenizer.json").read_bytes()
    once = with_cleaning(content, "canonicalize")
    assert once != content and with_cleaning(once, "canonicalize") == once
    bare = json.loads(content) | {"normalizer": None}
    assert json.loads(with_cleaning(json.dumps(bare).encode(), "lower"))["normalizer"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "", "[" * 100_000], ids=range(4))
def test_a_damaged_file_is_named(tmp_path, name, content):
    make_unigram(tmp_path / "files")
    (tmp_path / "files" / name).write_text(content)
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        tokenizer_of_folder(tmp_path / "files", siglip=True)
